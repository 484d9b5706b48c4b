/* compute/cuda/cu_libs.hpp on cuBLASLt, and on cuDNN for attention and convolution where it is
 * installed. The best algorithm of each shape is asked for once and kept. */
#include "compute/cuda/cu_libs.hpp"

#include "compute/cuda/cu_cudnn.hpp"

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

extern "C" void *cu_native_stream(cu_stream s);

enum { KEPT = 512 };

typedef struct shape {
    int64_t m, n, k, ldx, ldw, ldy;
    int type, y_type, epilogue, beta, aligned, scaled;
} shape;

typedef struct kept {
    bool used, works;
    shape key;
    cublasLtMatmulAlgo_t algo;
} kept;

struct qie_cu_libs {
    int device;
    cublasLtHandle_t lt;
    cu_cudnn *dnn; /* NULL: not here */
    kept table[KEPT];
};

int qie_cu_libs_create(int device, qie_cu_libs **out) {
    *out = NULL;
    qie_cu_libs *l = (qie_cu_libs *)calloc(1, sizeof *l);
    if (!l)
        return cu_fail(CU_OOM, "out of host memory");
    l->device = device;
    if (cublasLtCreate(&l->lt) != CUBLAS_STATUS_SUCCESS) {
        free(l);
        return cu_fail(CU_FAILED, "cuBLASLt does not start on this card");
    }
    l->dnn = cu_cudnn_open();
    *out = l;
    return CU_OK;
}

void qie_cu_libs_destroy(qie_cu_libs *l) {
    if (!l)
        return;
    cu_cudnn_close(l->dnn);
    cublasLtDestroy(l->lt);
    free(l);
}

static cudaDataType_t type_of(qie_dtype t) {
    switch (t) {
    case QIE_BF16: return CUDA_R_16BF;
    case QIE_F8_E4M3: return CUDA_R_8F_E4M3;
    case QIE_I8: return CUDA_R_8I;
    case QIE_I32: return CUDA_R_32I;
    default: return CUDA_R_32F;
    }
}

static cublasLtEpilogue_t epilogue_of(qie_cu_epilogue e) {
    switch (e) {
    case QIE_CU_EPI_BIAS: return CUBLASLT_EPILOGUE_BIAS;
    case QIE_CU_EPI_GELU_TANH: return CUBLASLT_EPILOGUE_GELU;
    case QIE_CU_EPI_BIAS_GELU_TANH: return CUBLASLT_EPILOGUE_GELU_BIAS;
    default: return CUBLASLT_EPILOGUE_DEFAULT;
    }
}

/* The library thinks in columns: y^T [n, m] = w [n, k] x^T, with w stored as its transpose. */
typedef struct problem {
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t w, x, y;
} problem;

static void problem_release(problem *p) {
    if (p->y)
        cublasLtMatrixLayoutDestroy(p->y);
    if (p->x)
        cublasLtMatrixLayoutDestroy(p->x);
    if (p->w)
        cublasLtMatrixLayoutDestroy(p->w);
    if (p->op)
        cublasLtMatmulDescDestroy(p->op);
}

static bool set(problem *p, cublasLtMatmulDescAttributes_t what, const void *value, size_t n) {
    return cublasLtMatmulDescSetAttribute(p->op, what, value, n) == CUBLAS_STATUS_SUCCESS;
}

/* A scale for each row of both operands: cuBLASLt 12.9 and later, on compute capability 9.0. */
static bool set_scales(problem *p, const qie_cu_gemm_args *a) {
#if CUBLAS_VERSION >= 120900
    cublasLtMatmulMatrixScale_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    return set(p, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode, sizeof mode) &&
           set(p, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode, sizeof mode) &&
           set(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &a->w_scale, sizeof a->w_scale) &&
           set(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &a->x_scale, sizeof a->x_scale);
#else
    (void)p;
    (void)a;
    return false;
#endif
}

static bool problem_make(problem *p, const qie_cu_gemm_args *a) {
    bool whole = a->type == QIE_I8;
    cublasOperation_t t = CUBLAS_OP_T;
    cublasLtEpilogue_t e = epilogue_of(a->epilogue);
    int8_t fast = 1;
    memset(p, 0, sizeof *p);
    if (cublasLtMatmulDescCreate(&p->op, whole ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F,
                                 whole ? CUDA_R_32I : CUDA_R_32F) != CUBLAS_STATUS_SUCCESS)
        return false;
    bool ok = set(p, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t) &&
              set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, &e, sizeof e);
    if (ok && a->bias)
        ok = set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &a->bias, sizeof a->bias);
    if (ok && a->type == QIE_F8_E4M3)
        ok = set(p, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast);
    if (ok && a->x_scale)
        ok = set_scales(p, a);
    return ok &&
           cublasLtMatrixLayoutCreate(&p->w, type_of(a->type), (uint64_t)a->k, (uint64_t)a->n,
                                      a->ldw) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutCreate(&p->x, type_of(a->type), (uint64_t)a->k, (uint64_t)a->m,
                                      a->ldx) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatrixLayoutCreate(&p->y, type_of(a->y_type), (uint64_t)a->n, (uint64_t)a->m,
                                      a->ldy) == CUBLAS_STATUS_SUCCESS;
}

/* Bytes that an address is a multiple of, up to 256. */
static uint32_t alignment(const void *p) {
    uintptr_t u = (uintptr_t)p | 256;
    return (uint32_t)(u & (~u + 1));
}

static uint32_t alignment_in_place(const qie_cu_gemm_args *a) {
    uint32_t w = alignment(a->w), x = alignment(a->x), y = alignment(a->y);
    uint32_t least = w < x ? w : x;
    return least < y ? least : y;
}

static bool ask(qie_cu_libs *l, const problem *p, const qie_cu_gemm_args *a, kept *slot) {
    cublasLtMatmulPreference_t pref = NULL;
    cublasLtMatmulHeuristicResult_t found;
    int n = 0;
    size_t bytes = a->workspace ? QIE_CU_LIBS_WORKSPACE : 0;
    uint32_t at_w = alignment(a->w), at_x = alignment(a->x), at_y = alignment(a->y);
    bool ok = cublasLtMatmulPreferenceCreate(&pref) == CUBLAS_STATUS_SUCCESS;
    ok = ok &&
         cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                              &bytes, sizeof bytes) == CUBLAS_STATUS_SUCCESS &&
         cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                                              &at_w, sizeof at_w) == CUBLAS_STATUS_SUCCESS &&
         cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                              &at_x, sizeof at_x) == CUBLAS_STATUS_SUCCESS &&
         cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                                              &at_y, sizeof at_y) == CUBLAS_STATUS_SUCCESS &&
         cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                                              &at_y, sizeof at_y) == CUBLAS_STATUS_SUCCESS;
    ok = ok && cublasLtMatmulAlgoGetHeuristic(l->lt, p->op, p->w, p->x, p->y, p->y, pref, 1, &found,
                                              &n) == CUBLAS_STATUS_SUCCESS;
    if (pref)
        cublasLtMatmulPreferenceDestroy(pref);
    slot->works = ok && n > 0;
    if (slot->works)
        slot->algo = found.algo;
    return slot->works;
}

static kept *slot_for(qie_cu_libs *l, const shape *key) {
    uint64_t h = 1469598103934665603u;
    const unsigned char *p = (const unsigned char *)key;
    for (size_t i = 0; i < sizeof *key; i++)
        h = (h ^ p[i]) * 1099511628211u;
    for (int k = 0; k < 8; k++) {
        kept *s = &l->table[(h + (uint64_t)k) % KEPT];
        if (!s->used || !memcmp(&s->key, key, sizeof *key))
            return s;
    }
    kept *s = &l->table[h % KEPT];
    s->used = false;
    return s;
}

bool qie_cu_gemm(qie_cu_libs *l, cu_stream s, const qie_cu_gemm_args *a) {
    shape key;
    memset(&key, 0, sizeof key); /* padding is compared too */
    key.m = a->m;
    key.n = a->n;
    key.k = a->k;
    key.ldx = a->ldx;
    key.ldw = a->ldw;
    key.ldy = a->ldy;
    key.type = (int)a->type;
    key.y_type = (int)a->y_type;
    key.epilogue = (int)a->epilogue;
    key.beta = a->beta != 0;
    key.aligned = (int)alignment_in_place(a);
    key.scaled = a->x_scale != NULL;
    cudaStream_t stream = (cudaStream_t)cu_native_stream(s);
    problem p;
    bool ok = problem_make(&p, a);
    kept *slot = slot_for(l, &key);
    if (ok && !slot->used) {
        slot->used = true;
        slot->key = key;
        ask(l, &p, a, slot);
    }
    int32_t one = (int32_t)a->alpha, none = (int32_t)a->beta;
    bool whole = a->type == QIE_I8;
    ok = ok && slot->works &&
         cublasLtMatmul(l->lt, p.op, whole ? (const void *)&one : &a->alpha, a->w, p.w, a->x, p.x,
                        whole ? (const void *)&none : &a->beta, a->y, p.y, a->y, p.y, &slot->algo,
                        a->workspace, a->workspace ? QIE_CU_LIBS_WORKSPACE : 0,
                        stream) == CUBLAS_STATUS_SUCCESS;
    problem_release(&p);
    return ok;
}

bool qie_cu_sdpa(qie_cu_libs *l, cu_stream s, const qie_attention_args *a, const int64_t *bounds,
                 void *workspace) {
    return !bounds && cu_cudnn_sdpa(l->dnn, s, a, workspace);
}

const char *qie_cu_libs_note(qie_cu_libs *l) {
    return cu_cudnn_note(l->dnn);
}

bool qie_cu_conv(qie_cu_libs *l, cu_stream s, const qie_conv2d_args *a, const void *w,
                 void *workspace) {
    return cu_cudnn_conv(l->dnn, s, a, w, workspace);
}
