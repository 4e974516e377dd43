// A guest that measures itself: nanoseconds of one system call each, or work.
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(int argc, char **argv) {
    int n = argc > 2 ? atoi(argv[2]) : 1000;
    if (!strcmp(argv[1], "exit") || !strcmp(argv[1], "inside")) {
        // ftruncate of a bad descriptor leaves the machine; getpid does not.
        long call = argv[1][0] == 'e' ? SYS_ftruncate : SYS_getpid;
        for (int i = 0; i < n / 10; i++) syscall(call, 99, 0);
        uint64_t before = now();
        for (int i = 0; i < n; i++) syscall(call, 99, 0);
        printf("%.1f\n", (double)(now() - before) / n);
        return 0;
    }
    if (!strcmp(argv[1], "compute")) {
        // Integer and floating point work on 4 MiB that was touched before.
        static uint32_t a[1 << 20];
        for (int i = 0; i < 1 << 20; i++) a[i] = i * 2654435761u;
        uint64_t before = now();
        double sum = 0;
        for (int round = 0; round < n; round++)
            for (int i = 0; i < 1 << 20; i++) {
                a[i] = a[i] * 1664525u + 1013904223u;
                sum += a[(a[i] >> 12)] * 1e-9;
            }
        printf("%.1f\n", (double)(now() - before));
        fprintf(stderr, "%f\n", sum);
        return 0;
    }
    return 64;
}
