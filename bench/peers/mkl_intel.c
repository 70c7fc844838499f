/* MKL, which PyTorch brings along, takes slower kernels on processors that are not Intel's. Preloaded,
 * this says that the processor is one, and the same kernels run as there. */
int mkl_serv_intel_cpu_true(void) { return 1; }
