/* The C floor: the least a supervisor can be. A yardstick, not a product.
 *
 *   floor SOCKET LIST      LIST has one command a line, words parted by spaces
 *
 * Starts every command, restarts each at once whenever and however it ends, answers each line it receives on SOCKET with one
 * line of JSON about all of them, and at SIGTERM ends them all and itself. One thread, one epoll; no output, no policy, no log.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WORDS = 8, PIDS = 1 << 22, REAPS_A_TURN = 16, ROW = 128 };

struct job {
    char *argv[WORDS + 1];
    pid_t pid;
    long restarts;
    int length;
    char row[ROW]; /* encoded when it changes, not when it is asked for: an answer is then a copy */
};

static struct job *jobs;
static int count, alive, stopping, null;
static int job_of[PIDS]; /* index + 1; only the pages of pids in use exist */
static sigset_t handled;
extern char **environ;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void start(struct job *job) {
    pid_t pid = vfork();
    if (pid < 0) fail("vfork");
    if (pid == 0) {
        sigprocmask(SIG_UNBLOCK, &handled, NULL);
        setpgid(0, 0);
        for (int fd = 0; fd < 3; fd++) dup2(null, fd);
        execve(job->argv[0], job->argv, environ);
        _exit(127);
    }
    job->pid = pid;
    job_of[pid] = (int)(job - jobs) + 1;
    job->length = snprintf(job->row, ROW, "{\"name\":\"j%d\",\"state\":\"running\",\"pid\":%d,\"restarts\":%ld,\"since\":%.3f},",
                           (int)(job - jobs), pid, job->restarts, now());
    alive++;
}

/* At most REAPS_A_TURN deaths, so that a crash storm leaves the socket its turn. True when there may be more. */
static int reap(void) {
    for (int turn = 0; turn < REAPS_A_TURN; turn++) {
        pid_t pid = waitpid(-1, NULL, WNOHANG);
        if (pid <= 0) return 0;
        if (!job_of[pid]) continue;
        struct job *job = &jobs[job_of[pid] - 1];
        job_of[pid] = 0;
        alive--;
        job->pid = 0;
        if (!stopping) {
            job->restarts++;
            start(job);
        }
    }
    return 1;
}

static void stop(void) {
    stopping = 1;
    for (int i = 0; i < count; i++)
        if (jobs[i].pid > 0) kill(jobs[i].pid, SIGTERM);
}

static void answer(int client) {
    char question[256];
    ssize_t size = read(client, question, sizeof question);
    if (size <= 0) {
        close(client);
        return;
    }
    char *reply = malloc(count * ROW + 4), *end = reply;
    if (!reply) fail("malloc");
    *end++ = '[';
    for (int i = 0; i < count; i++) end = mempcpy(end, jobs[i].row, jobs[i].length);
    end[-1] = ']'; /* over the last comma */
    *end++ = '\n';
    for (char *from = reply; from < end;) {
        ssize_t sent = send(client, from, end - from, MSG_NOSIGNAL);
        if (sent < 0) break;
        from += sent;
    }
    free(reply);
}

static void read_list(const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) fail(path);
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, file) > 0) {
        jobs = realloc(jobs, (count + 1) * sizeof *jobs);
        if (!jobs) fail("realloc");
        struct job *job = &jobs[count++];
        memset(job, 0, sizeof *job);
        char *rest = strdup(line), *word;
        for (int i = 0; i < WORDS && (word = strsep(&rest, " \n")) && *word; i++) job->argv[i] = word;
    }
    free(line);
    fclose(file);
}

static int watch(int poll, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    return epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
}

int main(int argc, char **argv) {
    if (argc != 3) return fputs("usage: floor SOCKET LIST\n", stderr), 2;
    read_list(argv[2]);
    null = open("/dev/null", O_RDWR | O_CLOEXEC);

    sigemptyset(&handled);
    sigaddset(&handled, SIGCHLD);
    sigaddset(&handled, SIGTERM);
    sigprocmask(SIG_BLOCK, &handled, NULL);
    int signals = signalfd(-1, &handled, SFD_CLOEXEC);

    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) fail(argv[1]);

    int poll = epoll_create1(EPOLL_CLOEXEC), more = 0;
    if (watch(poll, signals) || watch(poll, listener)) fail("epoll");
    for (int i = 0; i < count; i++) start(&jobs[i]);

    while (!stopping || alive) {
        struct epoll_event events[16];
        int ready = epoll_wait(poll, events, 16, more ? 0 : -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                watch(poll, accept4(listener, NULL, NULL, SOCK_CLOEXEC));
            } else if (fd == signals) {
                struct signalfd_siginfo info;
                if (read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == SIGTERM) stop();
                more = 1;
            } else {
                answer(fd);
            }
        }
        if (more) more = reap();
    }
    return 0;
}
