/* Takes as much as it gets, in one of several ways, and says how much that was and why it ended. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char block[1 << 20];

static void say(const char *what, int n) {
    int why = errno;
    printf("%s %d %s\n", what, n, why == ENOSPC ? "ENOSPC" : why == EAGAIN ? "EAGAIN" : why ? strerror(why) : "no error");
    fflush(stdout);
}

/* Processes, each made by the one before: the last says how many there are. */
static void chain(int n) {
    errno = 0;
    pid_t child = fork();
    if (child < 0) {
        say("processes", n);
        return;
    }
    if (child == 0) {
        chain(n + 1);
        _exit(0);
    }
    waitpid(child, 0, 0);
}

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "";
    int most = argc > 2 ? atoi(argv[2]) : 100;
    char name[64];
    int n = 0;
    errno = 0;
    if (!strcmp(mode, "chain")) {
        chain(1);
    } else if (!strcmp(mode, "output")) {
        memset(block, 'x', sizeof block);
        for (; n < most; n++) {
            if (fork() == 0) {
                write(1, block, 1000);
                _exit(0);
            }
            wait(0);
        }
    } else if (!strcmp(mode, "links") || !strcmp(mode, "directories")) {
        for (; n < most; n++) {
            snprintf(name, sizeof name, "/name%d", n);
            if (mode[0] == 'l' ? symlink("nowhere", name) : mkdir(name, 0700)) break;
        }
        say(mode, n);
    } else if (!strcmp(mode, "unlinked")) {
        for (; n < most; n++) {
            int fd = open("/file", O_CREAT | O_RDWR, 0600);
            if (fd < 0 || write(fd, block, sizeof block) != sizeof block || unlink("/file")) break;
            /* It stays open. */
        }
        say(mode, n);
    } else if (!strcmp(mode, "temporary")) {
        /* As `unlinked`, but closed, with another file open beside. */
        int log = open("/log", O_CREAT | O_RDWR, 0600);
        for (; n < most; n++) {
            int fd = open("/file", O_CREAT | O_RDWR, 0600);
            if (fd < 0 || unlink("/file") || write(fd, block, sizeof block) != sizeof block) break;
            close(fd);
        }
        say(mode, n);
        close(log);
    } else if (!strcmp(mode, "truncate")) {
        int fd = open("/file", O_CREAT | O_RDWR, 0600);
        for (; n < most; n++) {
            if (pwrite(fd, block, sizeof block, 0) != sizeof block || ftruncate(fd, 0)) break;
        }
        say(mode, n);
    } else if (!strcmp(mode, "rename")) {
        for (; n < most; n++) {
            int fd = open("/new", O_CREAT | O_RDWR, 0600);
            if (fd < 0 || write(fd, block, sizeof block) != sizeof block) break;
            close(fd);
            if (rename("/new", "/file")) break;
        }
        say(mode, n);
    } else if (!strcmp(mode, "together")) {
        /* Several processes make files in a directory of the lower layer, and append to a file of it. */
        for (int i = 0; i < 4; i++) {
            if (fork() == 0) {
                for (int j = 0; j < most; j++) {
                    snprintf(name, sizeof name, "/data/deep/er/new%d", j);
                    int fd = open(name, O_CREAT | O_WRONLY, 0600);
                    if (fd < 0) say("create", j);
                    close(fd);
                    fd = open("/data/words", O_WRONLY | O_APPEND);
                    if (fd < 0 || write(fd, "word\n", 5) != 5) say("append", j);
                    close(fd);
                }
                _exit(0);
            }
        }
        while (wait(0) > 0) {}
        struct stat s;
        stat("/data/words", &s);
        printf("bytes %d\n", (int)s.st_size);
    } else if (!strcmp(mode, "deep")) {
        /* A directory in one that is as deep. */
        mkdir("/a", 0700);
        chdir("/a");
        for (; n < most && !mkdir("d", 0) && !chmod("d", 0700) && !chdir("d"); n++) {}
        mkdir("/b", 0700);
        chdir("/b");
        for (int i = 0; i < n; i++) if (mkdir("d", 0700) || chdir("d")) break;
        errno = 0;
        rename("/a", "d");
        say("deep", n);
    }
    return 0;
}
