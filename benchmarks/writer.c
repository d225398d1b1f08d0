/* The child whose output is captured: it writes numbered lines of 100 bytes, and notes how many.
 *
 *   writer SLOT:MODE:LINES:MILLISECONDS:FOLDER
 *
 * appends { start, pid, slot } to FOLDER/starts as child.c does, waits until somebody opens the FIFO FOLDER/gate for writing,
 * writes until either limit is reached, appends "SLOT LINES BEGAN ENDED\n" (nanoseconds, monotonic) to FOLDER/done, and waits
 * for a signal. MODE: b, a thousand lines in each write(2); l, one line in each; p, one line in each, a thousand a second.
 * One argument, so that a run script can be `#!/path/writer SLOT:...`, with no shell between.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LINE = 100, LINES = 1000, THOUSANDS = 7, NUMBER_AT = 5 };

static char block[LINE * LINES];
static const char *folder;

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void write_all(int fd, const char *from, size_t size) {
    while (size) {
        ssize_t written = write(fd, from, size);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) _exit(3);
        from += written;
        size -= written;
    }
}

static int opened(const char *name, int flags) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0) _exit(4);
    return fd;
}

static void note(const char *name, const void *what, size_t size) {
    int fd = opened(name, O_WRONLY | O_APPEND);
    write_all(fd, what, size); /* small: one write, whole, whoever else writes */
    close(fd);
}

static void fill(int slot) {
    memset(block, 'x', sizeof block);
    for (int i = 0; i < LINES; i++) {
        char head[32];
        int size = snprintf(head, sizeof head, "%04d %0*d%03d ", slot, THOUSANDS, 0, i);
        memcpy(block + i * LINE, head, size);
        block[i * LINE + LINE - 1] = '\n';
    }
}

/* The next thousand: of each number, only the digits that change. */
static void advance(void) {
    int digit = NUMBER_AT + THOUSANDS - 1;
    while (block[digit] == '9') {
        for (int i = 0; i < LINES; i++) block[i * LINE + digit] = '0';
        digit--;
    }
    char next = block[digit] + 1;
    for (int i = 0; i < LINES; i++) block[i * LINE + digit] = next;
}

static void wait_until(long long ns) {
    struct timespec time = {ns / 1000000000, ns % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL) == EINTR) {}
}

int main(int argc, char **argv) {
    int slot, at = 0;
    char mode;
    long long limit, milliseconds;
    if (argc < 2 || sscanf(argv[1], "%d:%c:%lld:%lld:%n", &slot, &mode, &limit, &milliseconds, &at) != 4 || !at) return 2;
    folder = argv[1] + at;
    fill(slot);
    struct {
        long long ns;
        int pid, slot;
    } start = {now(), getpid(), slot};
    note("starts", &start, sizeof start);
    close(opened("gate", O_RDONLY));

    long long began = now(), end = began + milliseconds * 1000000, time = began, lines = 0;
    int step = mode == 'b' ? LINES : 1;
    while (lines + step <= limit && time < end) {
        if (lines && lines % LINES == 0) advance();
        write_all(STDOUT_FILENO, block + lines % LINES * LINE, (size_t)step * LINE);
        lines += step;
        if (mode == 'p') wait_until(began + lines * 1000000);
        time = now();
    }
    char done[128];
    note("done", done, snprintf(done, sizeof done, "%d %lld %lld %lld\n", slot, lines, began, time));
    for (;;) pause();
}
