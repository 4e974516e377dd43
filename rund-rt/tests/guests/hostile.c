// A guest that tries what it should not: pointers of others, ports, selectors, privileges. Each
// attack is one argument; what is expected to be refused says "refused".
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static const uint64_t wild[] = {
    0, 1, 0xfff, 0x10000, 0x7effffffff, 0x7f7fffffff, 0x7f80000000, 0x7fc0000000, 0x7fc0001000,
    0x7fc0002000, 0x7fc0004000, 0x7fc0005ff8, 0x7fffffffff, 0x7fffffffffff, 0x800000000000,
    0xffff800000000000, 0xffffffff81000000, UINT64_MAX - 7, UINT64_MAX,
};
#define WILDS (sizeof wild / sizeof *wild)

// Every call with wild pointers in every place.
static int pointers(void) {
    long worst = 0;
    for (long nr = 0; nr < 450; nr++) {
        // Those that end or split the process, wait, or are refused by design.
        if (nr == SYS_exit || nr == SYS_exit_group || nr == SYS_fork || nr == SYS_vfork ||
            nr == SYS_clone || nr == SYS_pause || nr == SYS_rt_sigreturn || nr == SYS_kill ||
            nr == SYS_tkill || nr == SYS_tgkill || nr == SYS_close || nr == SYS_munmap ||
            nr == SYS_dup2 || nr == SYS_dup3 || nr == SYS_poll || nr == SYS_ppoll ||
            nr == SYS_select || nr == SYS_wait4 || nr == SYS_arch_prctl || nr == SYS_brk ||
            nr == SYS_write || nr == SYS_writev || nr == SYS_rt_sigprocmask || nr == SYS_mremap ||
            nr == SYS_madvise || nr == SYS_nanosleep || nr == SYS_clock_nanosleep)
            continue;
        for (size_t i = 0; i < WILDS; i++)
            for (size_t at = 0; at < 3; at++) {
                uint64_t a[3] = {3, 3, 3};
                a[at] = wild[i];
                long r = syscall(nr, a[0], a[1], a[2], wild[(i + 7) % WILDS], 0, 0);
                if (r < worst) worst = r;
            }
    }
    printf("alive\n");
    return 0;
}

static sigjmp_buf back;
static void jump(int signal) {
    (void)signal;
    siglongjmp(back, 1);
}

// Whether this program could read the byte itself.
static int readable(uint64_t at) {
    signal(SIGSEGV, jump);
    if (sigsetjmp(back, 1)) return 0;
    (void)*(volatile char *)at;
    return 1;
}

// Whoever writes for the program reads what the program could, and nothing else.
static int write_from(void) {
    int wrong = 0;
    for (size_t i = 0; i < WILDS; i++) {
        ssize_t n = syscall(SYS_write, 1, wild[i], 16);
        int refused = n == -1 && errno == EFAULT;
        // The host refuses what lies beyond a program's own memory; the shim need not.
        wrong += !refused && !readable(wild[i]);
    }
    struct iovec parts[2] = {{(void *)0xffffffff81000000, 8}, {(void *)0, 8}};
    wrong += !(writev(1, parts, 2) == -1 && errno == EFAULT);
    wrong += !(syscall(SYS_read, 0, 0xffff800000000000, 16) == -1 && errno == EFAULT);
    wrong += !(syscall(SYS_clock_gettime, 1, 0x7fc0001000) == -1 && errno == EFAULT);
    fprintf(stderr, "%d wrong\n", wrong);
    return 0;
}

static volatile int caught;
static void on_fault(int signal) {
    (void)signal;
    caught++;
    _exit(70);
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "pointers")) return pointers();
    if (!strcmp(what, "write")) return write_from();
    if (!strcmp(what, "null")) { *(volatile int *)0 = 1; return 0; }
    if (!strcmp(what, "tables")) { *(volatile uint64_t *)0x7fc0001010 = 1; return 0; }
    if (!strcmp(what, "code")) { *(volatile char *)0x7fc0004000 = 1; return 0; }
    if (!strcmp(what, "text")) { *(volatile char *)(uintptr_t)&main = 1; return 0; }
    if (!strcmp(what, "stack")) {
        static unsigned char ret = 0xc3;
        ((void (*)(void))&ret)();
        return 0;
    }
    if (!strcmp(what, "cli")) { __asm__ volatile("cli"); return 0; }
    if (!strcmp(what, "hlt")) { __asm__ volatile("hlt"); return 0; }
    if (!strcmp(what, "out")) { __asm__ volatile("outb %%al, $0x70" ::"a"(0)); return 0; }
    if (!strcmp(what, "in")) { __asm__ volatile("inb $0x60, %%al" ::: "al"); return 0; }
    // Ports that something answers for, in the wrong way.
    if (!strcmp(what, "in80")) { __asm__ volatile("inb $0x80, %%al" ::: "al"); return 0; }
    if (!strcmp(what, "insb")) { char b[2]; void *p = b; long n = 2; __asm__ volatile("rep insb" : "+D"(p), "+c"(n) : "d"(0xa1) : "memory"); return 0; }
    if (!strcmp(what, "out82")) { __asm__ volatile("outw %%ax, $0x82" ::"a"(0)); return 0; }
    if (!strcmp(what, "cr3")) { __asm__ volatile("mov %%cr3, %%rax" ::: "rax"); return 0; }
    if (!strcmp(what, "wrmsr")) { __asm__ volatile("wrmsr" ::"c"(0xc0000082), "a"(0), "d"(0)); return 0; }
    if (!strcmp(what, "lidt")) {
        char idt[10] = {0};
        __asm__ volatile("lidt %0" ::"m"(idt));
        return 0;
    }
    if (!strcmp(what, "ud2")) { __asm__ volatile("ud2"); return 0; }
    if (!strcmp(what, "int80")) { __asm__ volatile("int $0x80" ::"a"(1)); return 0; }
    if (!strcmp(what, "div")) { volatile int one = 1, zero = 0; return one / zero; }
    if (!strcmp(what, "loop")) for (;;) __asm__ volatile("");
    if (!strcmp(what, "sleep")) for (;;) pause(), sleep(1000);
    if (!strcmp(what, "recurse")) {
        struct rec { char big[4096]; } r;
        memset(&r, argc, sizeof r);
        char *again[] = {argv[0], argv[1], NULL};
        return main(2, again) + r.big[17];
    }
    if (!strcmp(what, "shim")) {
        // The page that the host and the shim speak through, full of lies.
        volatile uint64_t *data = (uint64_t *)0x7fc0005000;
        for (int i = 0; i < 512; i++) data[i] = wild[i % WILDS];
        char byte;
        for (int i = 0; i < 64; i++) {
            syscall(SYS_read, i, &byte, 1);
            syscall(SYS_brk, wild[i % WILDS]);
            syscall(SYS_mmap, 0, 4096, 3, 0x22, -1, 0);
            syscall(SYS_ftruncate, 99, 0);
        }
        return 71;
    }
    if (!strcmp(what, "cs")) {
        unsigned before, after;
        __asm__ volatile("mov %%cs, %0" : "=r"(before));
        syscall(SYS_ftruncate, 99, 0);
        syscall(SYS_getpid);
        __asm__ volatile("mov %%cs, %0" : "=r"(after));
        printf("%#x %#x\n", before, after);
        return 0;
    }
    if (!strcmp(what, "trap")) {
        // A call with the trap flag set, and with the table of descriptors for a stack: an exception
        // in the entry's ring 0 would be pushed over the descriptor of the user's code.
        static char stack[1 << 16];
        stack_t other = {.ss_sp = stack, .ss_size = sizeof stack};
        sigaltstack(&other, NULL);
        struct sigaction action = {.sa_handler = jump, .sa_flags = SA_ONSTACK};
        sigaction(SIGTRAP, &action, NULL);
        // Where the entry does not put the flag back, the guest goes on to the end.
        sigaction(SIGILL, &action, NULL);
        unsigned before = 0, after = 0;
        __asm__ volatile("lar %1, %0" : "=r"(before) : "r"(0x33));
        if (!sigsetjmp(back, 1))
            __asm__ volatile(
                "mov $77, %%eax\n\t" // ftruncate
                "mov $99, %%edi\n\t"
                "pushq $0x2b\n\t"
                "pushq %0\n\t"
                "pushfq\n\t"
                "orq $0x100, (%%rsp)\n\t"
                "pushq $0x33\n\t"
                "leaq 1f(%%rip), %%rcx\n\t"
                "pushq %%rcx\n\t"
                "iretq\n"
                "1: syscall\n\t"
                "nop\n\t"
                "ud2"
                ::"r"(0x7fc0001000UL + 8 * 8)
                : "rax", "rcx", "r11", "rdi", "memory");
        __asm__ volatile("lar %1, %0" : "=r"(after) : "r"(0x33));
        printf("%s\n", before == after ? "same" : "changed");
        return 0;
    }
    if (!strcmp(what, "handler")) {
        signal(SIGSEGV, on_fault);
        *(volatile int *)8 = 1;
        return 0;
    }
    if (!strcmp(what, "memory")) {
        size_t n = 0;
        while (1) {
            char *p = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (p == MAP_FAILED) break;
            memset(p, 1, 1 << 20);
            n++;
        }
        printf("%s after %s MiB\n", errno == ENOMEM ? "refused" : "odd", n > 16 ? "many" : "few");
        return 0;
    }
    if (!strcmp(what, "forks")) {
        int made = 0;
        while (made < 500) {
            pid_t pid = fork();
            if (pid < 0) break;
            if (pid == 0) for (;;) sleep(1000);
            made++;
        }
        printf("%s\n", made < 500 && errno == EAGAIN ? "refused" : "odd");
        return 0;
    }
    if (!strcmp(what, "fill")) {
        int file = open("/big", O_WRONLY | O_CREAT, 0600);
        static char block[1 << 16];
        ssize_t n;
        size_t total = 0;
        while ((n = write(file, block, sizeof block)) > 0) total += n;
        printf("%s after %zu\n", errno == ENOSPC ? "refused" : "odd", total);
        return 0;
    }
    if (!strcmp(what, "dirty")) {
        // Everything that a program can change of its machine.
        size_t size = 8 << 20;
        char *p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(p, 0x5a, size);
        memset(malloc(1 << 20), 0xa5, 1 << 20);
        volatile double d = 1.0 / argc;
        unsigned mxcsr = 0x1f80 | 0x2000;
        __asm__ volatile("ldmxcsr %0" ::"m"(mxcsr));
        __asm__ volatile("fldpi; fldl2e; vpcmpeqd %%ymm7, %%ymm7, %%ymm7" ::: "xmm7");
        __asm__ volatile("mov %0, %%ds; mov %0, %%es" ::"r"(0));
        __asm__ volatile("mov %0, %%gs" ::"r"(0x2b));
        __asm__ volatile("wrgsbase %0" ::"r"(0x123456789UL));
        __asm__ volatile("std; cld");
        volatile uint64_t *data = (uint64_t *)0x7fc0005000;
        for (int i = 64; i < 512; i++) data[i] = i;
        (void)d;
        write(1, "dirty\n", 6);
        _exit(0);
    }
    return 64;
}
