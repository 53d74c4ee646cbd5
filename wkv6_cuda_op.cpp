// The operator wkv6::launch: one launch of a kernel in wkv6_cuda.cu.
//
// wkv6_gpu.py says which kernel, and with which arguments: pointers to the tensors' numbers, then
// ints. It runs on the tensors' GPU, on the stream that PyTorch uses there.

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string>
#include <vector>

namespace wkv6_gpu {

const void* wkv6_kernel(const std::string& name);  // in wkv6_cuda.cu

void launch(std::string name, at::IntArrayRef grid, int64_t threads, int64_t shared_bytes,
            at::TensorList tensors, at::IntArrayRef ints) {
  const void* kernel = wkv6_kernel(name);
  TORCH_CHECK(kernel, "wkv6: there is no kernel ", name);
  std::vector<void*> pointers;
  for (const auto& tensor : tensors) pointers.push_back(tensor.data_ptr());
  std::vector<int> numbers(ints.begin(), ints.end());

  std::vector<void*> arguments;  // where each argument is
  for (auto& pointer : pointers) arguments.push_back(&pointer);
  for (auto& number : numbers) arguments.push_back(&number);

  const c10::cuda::CUDAGuard guard(tensors[0].device());
  const dim3 blocks(grid[0], grid[1], grid[2]);
  C10_CUDA_CHECK(cudaLaunchKernel(kernel, blocks, dim3(threads), arguments.data(), shared_bytes,
                                  c10::cuda::getCurrentCUDAStream()));
}

}  // namespace wkv6_gpu

TORCH_LIBRARY_FRAGMENT(wkv6, m) {
  m.def(
      "launch(str kernel, int[] grid, int threads, int shared_bytes, Tensor[] tensors, int[] ints)"
      " -> ()",
      &wkv6_gpu::launch);
}
