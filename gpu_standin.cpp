// A stand-in for a GPU, for tests: PyTorch's device PrivateUse1, named "gpu" by gpu_standin.py.
//
// Its memory is the host's, and the CPU does its arithmetic. What a GPU refuses, it refuses:
// operators that are given its tensors together with the CPU's. Its autocast is CUDA's, by
// PyTorch's own lists of operators. It counts what costs time on a GPU: launches, copies,
// synchronizations.

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

using at::Tensor;
constexpr auto GPU = c10::DeviceType::PrivateUse1;
constexpr size_t ALIGNMENT = 64;
constexpr size_t CARD_BYTES = size_t(8) << 30;  // what it says that it has

std::mutex counts_mutex;  // the backward pass runs in threads of its own
std::map<std::string, int64_t> counts;
thread_local bool in_fallback = false;

void count(const std::string& what) {
  const std::lock_guard lock(counts_mutex);
  counts[what]++;
}

size_t rounded(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// ---- memory ------------------------------------------------------------------------------------

// Memory of the device. The size of a piece stands in front of it, for the statistics.
class Memory final : public c10::DeviceAllocator {
  std::atomic<int64_t> now_ = 0, peak_ = 0;

  void change(int64_t bytes) {
    const int64_t now = now_ += bytes;
    if (now > peak_) peak_ = now;
  }

 public:
  static Memory& instance() {
    static auto& memory = *new Memory;  // never destroyed: tensors may outlive static objects
    return memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(GPU, 0);
    if (bytes == 0) return {nullptr, device};
    auto* piece = static_cast<char*>(aligned_alloc(ALIGNMENT, ALIGNMENT + rounded(bytes)));
    *reinterpret_cast<size_t*>(piece) = bytes;
    change(bytes);
    return {piece + ALIGNMENT, piece, &release, device};
  }

  static void release(void* piece) {
    instance().change(-static_cast<int64_t>(*static_cast<size_t*>(piece)));
    free(piece);
  }

  // Not of use here: the pointer to free is not the pointer to the data.
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override { peak_ = now_.load(); }

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = now_;
    stats.allocated_bytes[0].peak = peak_;
    return stats;
  }

  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    return {CARD_BYTES - now_, CARD_BYTES};
  }
};

const bool registered = (c10::SetAllocator(GPU, &Memory::instance()), true);

// Pinned memory of the host. A GPU can copy from it while the host goes on.
class Pinned final : public c10::Allocator {
  static inline std::mutex mutex_;
  static inline std::map<const char*, size_t> pieces_;  // address -> bytes

 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = rounded(bytes) + ALIGNMENT;
    void* piece = aligned_alloc(ALIGNMENT, size);
    const std::lock_guard lock(mutex_);
    pieces_[static_cast<const char*>(piece)] = size;
    return {piece, piece, &release, c10::Device(c10::kCPU)};
  }

  static void release(void* piece) {
    const std::lock_guard lock(mutex_);
    pieces_.erase(static_cast<const char*>(piece));
    free(piece);
  }

  static bool holds(const void* data) {
    const auto* address = static_cast<const char*>(data);
    const std::lock_guard lock(mutex_);
    auto after = pieces_.upper_bound(address);
    if (after == pieces_.begin()) return false;
    const auto& [begin, size] = *--after;
    return address < begin + size;
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
} pinned_memory;

// ---- the device --------------------------------------------------------------------------------

// One device with one stream, on which everything has happened as soon as it is asked for.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<GPU> {
  static c10::Device device() { return {GPU, 0}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }

  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { count("synchronizations"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { count("synchronizations"); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { count("synchronizations"); }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return Pinned::holds(data); }

  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }

  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = Memory::instance().allocate(bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
} hooks;

// ---- operators ---------------------------------------------------------------------------------

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
             std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &Memory::instance(), KEYS,
                                   at::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), &Memory::instance(),
                                           KEYS, at::dtype_or_default(dtype));
}

// The same memory, as a tensor of the CPU.
Tensor on_host(const Tensor& x) {
  if (!x.device().is_privateuseone()) return x;
  return at::from_blob(const_cast<void*>(x.const_data_ptr()), x.sizes(), x.strides(),
                       x.options().device(at::kCPU));
}

const char* kind_of_copy(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (!from.device().is_privateuseone()) {
    const bool waits = !non_blocking || !Pinned::holds(from.const_data_ptr());
    return waits ? "to the device" : "pinned to the device";
  }
  if (!to.device().is_privateuseone()) return "from the device";
  return "launches";
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (!in_fallback) count(kind_of_copy(from, to, non_blocking));
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) const_cast<Tensor&>(to).resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const Tensor& x) {
  count("synchronizations");
  return at::_local_scalar_dense(on_host(x));
}

Tensor as_strided(const Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  const auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(x, C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& x, c10::SymIntArrayRef size) {
  return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return as_strided(x, size, stride, std::nullopt);
}

Tensor unfold(const Tensor& x, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(x, dim, size, step);
}

const Tensor& resize_(const Tensor& x, c10::SymIntArrayRef size,
                      std::optional<at::MemoryFormat> format) {
  return at::native::resize_(x, C10_AS_INTARRAYREF_SLOW(size), format);
}

// A GPU takes tensors of its own, and numbers: tensors of no dimensions.
void check_device(const Tensor& x, const std::string& name) {
  TORCH_CHECK(!x.defined() || x.device().is_privateuseone() || x.dim() == 0,
              "Expected all tensors to be on the same device, but ", name,
              " was given one of the CPU beside the GPU's");
}

// Whether the host has to know numbers of the device to make the result: its size depends on them.
bool waits(const std::string& name, const torch::jit::Stack* stack, size_t arguments) {
  static const std::set<std::string> always = {
      "aten::nonzero",    "aten::masked_select",      "aten::_unique",          "aten::_unique2",
      "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"};
  if (always.count(name)) return true;
  if (name != "aten::_index_put_impl_") return false;  // aten::index calls nonzero
  for (size_t i = stack->size() - arguments; i < stack->size(); i++) {
    if (!(*stack)[i].isList()) continue;
    for (const c10::IValue& index : (*stack)[i].toListRef()) {
      if (index.isTensor() && index.toTensor().defined() && index.toTensor().dtype() == at::kBool)
        return true;
    }
  }
  return false;
}

// Every other operator: the CPU's.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto name = op.schema().operator_name().name;
  const size_t arguments = op.schema().arguments().size();
  for (size_t i = stack->size() - arguments; i < stack->size(); i++) {
    const auto& value = (*stack)[i];
    if (name.find("copy") != std::string::npos) continue;
    if (value.isTensor()) check_device(value.toTensor(), name);
    if (value.isTensorList()) {
      for (const Tensor& x : value.toTensorVector()) check_device(x, name);
    }
  }
  count("launches");
  count(name);
  if (waits(name, stack, arguments)) count("synchronizations");
  in_fallback = true;
  try {
    at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  } catch (...) {
    in_fallback = false;
    throw;
  }
  in_fallback = false;
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar_dense));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("view", TORCH_FN(view));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("unfold", TORCH_FN(unfold));
  m.impl("resize_", TORCH_FN(resize_));
}

// ---- autocast: CUDA's lists --------------------------------------------------------------------

using namespace at::autocast;
#define TO_LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define TO_FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define WITH_FLOAT32_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define TO_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m){
    AT_FORALL_LOWER_PRECISION_FP(TO_LOWER_PRECISION) AT_FORALL_FP32(TO_FLOAT32)
        AT_FORALL_FP32_SET_OPT_DTYPE(WITH_FLOAT32_DTYPE) AT_FORALL_PROMOTE(TO_WIDEST)}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("counts", [] { return counts; });
  m.def("clear", [] { counts.clear(); });
}
