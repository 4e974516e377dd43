/* Touches as much memory as each line asks for, in MiB, and says so. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void) {
    char line[64];
    setvbuf(stdout, 0, _IOLBF, 0);
    while (fgets(line, sizeof line, stdin)) {
        size_t mib = strtoul(line, 0, 10);
        char *p = malloc(mib << 20);
        if (!p) {
            printf("no memory\n");
            continue;
        }
        for (size_t at = 0; at < mib << 20; at += 4096) {
            p[at] = 1;
        }
        printf("touched %zu MiB\n", mib);
        free(p);
    }
    return 0;
}
