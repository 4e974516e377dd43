// A guest: reads a file of its root before it is saved, then answers each line of its input:
// writes it to its writable layer, reads it back, and says it with its own id.
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(void) {
    char line[256], text[300], motto[64] = "none";
    int file = open("/data/motto", O_RDONLY);
    if (file >= 0) {
        ssize_t n = read(file, motto, sizeof motto - 1);
        close(file);
        if (n > 0) motto[n] = 0;
        motto[strcspn(motto, "\n")] = 0;
    }
    for (;;) {
        ssize_t n = read(0, line, sizeof line - 1);
        if (n <= 0) return n < 0;
        line[n] = 0;
        line[strcspn(line, "\n")] = 0;
        file = open("/tmp/answer", O_RDWR | O_CREAT | O_TRUNC, 0600);
        if (file < 0) return 2;
        if (write(file, line, strlen(line)) != (ssize_t)strlen(line)) return 3;
        ssize_t m = pread(file, text, sizeof text, 0);
        close(file);
        if (m != (ssize_t)strlen(line)) return 4;
        text[m] = 0;
        char answer[512];
        int k = snprintf(answer, sizeof answer, "%s %s %d\n", motto, text, (int)getpid());
        if (write(1, answer, k) != k) return 5;
    }
}
