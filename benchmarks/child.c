/* The child that every supervisor here keeps: it notes its own start and then does nothing, without libc.
 *
 *   child SLOT:MODE:FD:PATH
 *
 * appends { start, pid, slot } to PATH in one write (O_APPEND: whole records, whoever else writes), says "\n" on descriptor
 * FD if it is a digit (readiness, as s6 wants it), and then waits for a signal (MODE l, live) or exits with 1 (MODE c, crash).
 * One argument, so that a run script can be `#!/path/child SLOT:MODE:FD:PATH`, with no shell between.
 */
struct start {
    long long ns; /* CLOCK_MONOTONIC */
    int pid;
    int slot;
};

struct timespec {
    long seconds;
    long nanoseconds;
};

#if defined(__x86_64__)
enum { WRITE = 1, CLOSE = 3, GETPID = 39, EXIT = 60, CLOCK_GETTIME = 228, OPENAT = 257, PPOLL = 271 };

static long call(long number, long a, long b, long c, long d, long e) {
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall live\n");
#elif defined(__aarch64__)
enum { OPENAT = 56, CLOSE = 57, WRITE = 64, PPOLL = 73, EXIT = 93, CLOCK_GETTIME = 113, GETPID = 172 };

static long call(long number, long a, long b, long c, long d, long e) {
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
    return x0;
}

__asm__(".globl _start\n_start:\n\tmov x29, xzr\n\tmov x0, sp\n\tbl live\n");
#else
#error "no system calls known for this machine: the Python child is used instead"
#endif

__attribute__((noreturn, used)) void live(long *stack) {
    enum { HERE = -100, APPEND = 02001, MONOTONIC = 1 };
    if (stack[0] < 2)
        for (;;) call(EXIT, 2, 0, 0, 0, 0);
    const char *argument = (const char *)stack[2];
    struct start start = {0, (int)call(GETPID, 0, 0, 0, 0, 0), 0};
    while (*argument != ':') start.slot = start.slot * 10 + (*argument++ - '0');
    char mode = argument[1], ready = argument[3];
    const char *path = argument + 5;

    long log = call(OPENAT, HERE, (long)path, APPEND, 0, 0);
    struct timespec now;
    call(CLOCK_GETTIME, MONOTONIC, (long)&now, 0, 0, 0);
    start.ns = now.seconds * 1000000000LL + now.nanoseconds;
    call(WRITE, log, (long)&start, sizeof start, 0, 0);
    call(CLOSE, log, 0, 0, 0, 0);
    if (ready >= '0' && ready <= '9') {
        call(WRITE, ready - '0', (long)"\n", 1, 0, 0);
        call(CLOSE, ready - '0', 0, 0, 0, 0);
    }
    for (;;) {
        if (mode == 'c') call(EXIT, 1, 0, 0, 0, 0);
        call(PPOLL, 0, 0, 0, 0, 0);
    }
}
