// A guest that uses a little of everything a C program uses.
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int compare(const void *a, const void *b) { return *(int *)a - *(int *)b; }

int main(int argc, char **argv) {
    printf("argc %d", argc);
    for (int i = 0; i < argc; i++) printf(" [%s]", argv[i]);
    printf("\nHOME %s\n", getenv("HOME") ? getenv("HOME") : "unset");
    int numbers[1000];
    srand(7);
    for (int i = 0; i < 1000; i++) numbers[i] = rand() % 10000;
    qsort(numbers, 1000, sizeof *numbers, compare);
    long sum = 0;
    for (int i = 0; i < 1000; i++) sum += (long)numbers[i] * i;
    printf("sum %ld sin %.9f\n", sum, sin(1.0));
    char *big = malloc(10 << 20);
    memset(big, 7, 10 << 20);
    big = realloc(big, 20 << 20);
    printf("big %d %d\n", big[0], big[(10 << 20) - 1]);
    free(big);
    jmp_buf back;
    if (!setjmp(back)) longjmp(back, 1);
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    usleep(2000);
    clock_gettime(CLOCK_MONOTONIC, &b);
    long slept = (b.tv_sec - a.tv_sec) * 1000000 + (b.tv_nsec - a.tv_nsec) / 1000;
    printf("slept %s\n", slept >= 2000 && slept < 60000000 ? "well" : "badly");
    FILE *file = fopen("/nowhere/at/all", "r");
    printf("open %s %s\n", file ? "yes" : "no", strerror(errno));
    fprintf(stderr, "to stderr\n");
    return 42;
}
