// The kernel table of one instruction set, LOMEM_CPU_CAPABILITY. This file is compiled once per instruction set (see
// CMakeLists.txt in the parent folder).
#include <lomem/core/activation.h>

#include "../kernel_table.h"
#include "drawn.h"
#include "dropout.h"
#include "gated.h"
#include "mersenne.h"
#include "norm.h"
#include "packing.h"
#include "search.h"
#include "step.h"
#include "storage.h"

#define LOMEM_JOIN_(a, b) a##b
#define LOMEM_JOIN(a, b) LOMEM_JOIN_(a, b)

namespace lomem::cpu {

namespace {

template <class Function, class FastFunction>
constexpr KernelTable::Fused fused_kernels{
    .encode = &step_encode<typename Function::PublishedSteps>,
    .fast_forward = fast_forward_kernel<FastFunction, typename Function::PublishedSteps>,
};

}  // namespace

const KernelTable LOMEM_JOIN(LOMEM_CPU_CAPABILITY, _kernels) = {
    .capability = LOMEM_CPU_CAPABILITY_NAME,
    .gelu = fused_kernels<GELU, fast::GELU>,
    .gelu_tanh = fused_kernels<GELUTanh, fast::GELUTanh>,
    .silu = fused_kernels<SiLU, fast::SiLU>,
#define LOMEM_KERNEL(name, ...) .name = &name,
#include <lomem/cpu/kernels.def>
#undef LOMEM_KERNEL
    .layer_norm_forward = &norm_forward<Norm::layer>,
    .rms_norm_forward = &norm_forward<Norm::rms>,
    .layer_norm_backward = &norm_backward<Norm::layer>,
    .rms_norm_backward = &norm_backward<Norm::rms>,
};

}  // namespace lomem::cpu
