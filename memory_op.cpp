// Memory for CPU tensors that is kept and used again: what PyTorch has for GPUs and not for CPUs. memory::reuse() puts it in place.
//
// A C library has two ways with a freed tensor. It returns the pages at once; then the next tensor gets fresh ones, each zeroed by the
// system at its first touch, and a training step takes far longer. Or it keeps them in its heap; there, small objects come to lie
// between the tensors, so that holes do not join, and the heap grows well beyond what the tensors take.
//
// Here tensors are among themselves. What is freed joins its free neighbours to one hole, and a new tensor takes a piece of the
// smallest hole that it fits in ("best fit"). Nothing is given back before the process ends: what a run takes is what its peak took.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <sys/mman.h>

#include <map>
#include <mutex>

namespace {

constexpr size_t PAGE = 4096, SMALL = 1 << 16;  // bytes; what is smaller stays with the C library

class TensorHeap final : public c10::Allocator {
  std::mutex mutex_;
  std::map<char*, size_t> holes_, used_;  // address -> bytes; no two holes are neighbours
  c10::Allocator* const small_ = c10::GetDefaultCPUAllocator();

 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < SMALL) {
      void* small = small_->raw_allocate(bytes);
      return {small, small, raw_deleter(), c10::Device(c10::kCPU)};
    }
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    const std::lock_guard lock(mutex_);
    auto best = holes_.end();
    for (auto hole = holes_.begin(); hole != holes_.end(); ++hole)
      if (hole->second >= bytes && (best == holes_.end() || hole->second < best->second)) best = hole;
    if (best == holes_.end()) {
      void* fresh = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      TORCH_CHECK_WITH(OutOfMemoryError, fresh != MAP_FAILED, "no memory for a tensor of ", bytes, " bytes");
      best = holes_.emplace(static_cast<char*>(fresh), bytes).first;
    }
    const auto [begin, size] = *best;
    holes_.erase(best);
    if (size > bytes) holes_.emplace(begin + bytes, size - bytes);
    used_.emplace(begin, bytes);
    return {begin, begin, raw_deleter(), c10::Device(c10::kCPU)};
  }

  void release(void* address) {
    const std::lock_guard lock(mutex_);
    auto hole = used_.extract(static_cast<char*>(address));
    if (hole.empty()) return small_->raw_deallocate(address);
    auto next = holes_.lower_bound(hole.key());
    if (next != holes_.end() && next->first == hole.key() + hole.mapped()) {
      hole.mapped() += next->second;
      next = holes_.erase(next);
    }
    if (next != holes_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == hole.key()) {
        before->second += hole.mapped();
        return;
      }
    }
    holes_.insert(next, std::move(hole));  // takes no memory: nothing here may fail
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return [](void* address) { heap().release(address); };
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static TensorHeap& heap() {
    static auto& heap = *new TensorHeap;  // never destroyed: tensors may outlive every static object
    return heap;
  }
};

}  // namespace

TORCH_LIBRARY(memory, m) {
  m.def("reuse() -> ()", [] { c10::SetAllocator(c10::DeviceType::CPU, &TensorHeap::heap()); });
}
