// What the CPU backend uses of Apple's header, under the names that ACCELERATE_NEW_LAPACK gives.
#pragma once

enum CBLAS_ORDER { CblasRowMajor = 101, CblasColMajor };
enum CBLAS_TRANSPOSE { CblasNoTrans = 111, CblasTrans, CblasConjTrans };

extern "C" void cblas_sgemm(
    CBLAS_ORDER order,
    CBLAS_TRANSPOSE transpose_a,
    CBLAS_TRANSPOSE transpose_b,
    int m,
    int n,
    int k,
    float alpha,
    const float* a,
    int lda,
    const float* b,
    int ldb,
    float beta,
    float* c,
    int ldc) __asm("_cblas_sgemm$NEWLAPACK");
