// The kernel table of one instruction set, LOMEM_CPU_CAPABILITY. This file is compiled once for each
// (cpp/src/CMakeLists.txt).
#include "../kernel_table.h"
#include "norm.h"
#include "packing.h"
#include "search.h"
#include "step.h"

#define LOMEM_JOIN_(a, b) a##b
#define LOMEM_JOIN(a, b) LOMEM_JOIN_(a, b)

namespace lomem::cpu {

const KernelTable LOMEM_JOIN(LOMEM_CPU_CAPABILITY, _kernels) = {
    LOMEM_CPU_CAPABILITY_NAME,
    &step_encode<ReGELU2>,
    &step_encode<ReSiLU2>,
    &step_search_encode,
    &band_encode,
    &step_decode_multiply,
    fast_forward_kernel<fast::GELU, ReGELU2>,
    fast_forward_kernel<fast::GELUTanh, ReGELU2>,
    fast_forward_kernel<fast::SiLU, ReSiLU2>,
    &pack_bits,
    &unpack_bits,
    &norm_forward<Norm::layer>,
    &norm_forward<Norm::rms>,
    &norm_backward<Norm::layer>,
    &norm_backward<Norm::rms>,
};

}  // namespace lomem::cpu
