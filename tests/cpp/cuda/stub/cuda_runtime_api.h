// As much of the CUDA runtime's header as declarations of launchers need, for machines without CUDA.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorUnknown = 999 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
