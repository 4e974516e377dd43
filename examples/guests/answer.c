// A function in a sandbox: it has read its root before it was saved; then it answers each line of
// its input, writes the answer to its own layer, reads it back, and says it with its own id.
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(void) {
    char line[256], text[512], motto[64] = "";
    int file = open("/data/motto", O_RDONLY);
    if (file < 0) return 1;
    ssize_t n = read(file, motto, sizeof motto - 1);
    close(file);
    motto[strcspn(motto, "\n")] = 0;
    while ((n = read(0, line, sizeof line - 1)) > 0) {
        line[n] = 0;
        line[strcspn(line, "\n")] = 0;
        unsigned hash = 2166136261u;
        for (const char *c = line; *c; c++) hash = (hash ^ (unsigned char)*c) * 16777619u;
        int k = snprintf(text, sizeof text, "%s %s %08x %d\n", motto, line, hash, (int)getpid());
        file = open("/tmp/answer", O_RDWR | O_CREAT | O_TRUNC, 0600);
        if (file < 0 || write(file, text, k) != k) return 2;
        if (pread(file, text, sizeof text, 0) != k) return 3;
        close(file);
        if (write(1, text, k) != k) return 4;
    }
    return 0;
}
