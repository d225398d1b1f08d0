/* The C floor: the least a supervisor can be. A yardstick, not a product.
 *
 *   floor SOCKET LIST [FOLDER]      LIST has one command a line, words parted by spaces
 *
 * Starts every command, restarts each at once whenever and however it ends, answers each line it receives on SOCKET with one
 * line of JSON about all of them, and at SIGTERM ends them all and itself. One thread, one epoll; no policy, no log. With
 * FOLDER it appends what the command of line N writes to FOLDER/jN.log; without, that is thrown away.
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

enum { WORDS = 8, PIDS = 1 << 22, REAPS_A_TURN = 16, ROW = 128, CHUNK = 1 << 16, DESCRIPTORS = 1 << 16 };

struct job {
    char *argv[WORDS + 1];
    pid_t pid;
    long restarts;
    int length;
    char row[ROW]; /* encoded when it changes, not when it is asked for: an answer is then a copy */
};

static struct job *jobs;
static int count, alive, stopping, null, poll;
static const char *folder;
static int log_of[DESCRIPTORS]; /* of the pipe that is read here; 0: it is none */
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

static int watch(int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    return epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
}

/* The writing end of a new pipe; the reading end is watched, and goes to the job's file. */
static int output(const struct job *job) {
    char path[4096];
    int ends[2];
    snprintf(path, sizeof path, "%s/j%d.log", folder, (int)(job - jobs));
    if (pipe2(ends, O_CLOEXEC) || ends[0] >= DESCRIPTORS || watch(ends[0])) fail("pipe");
    log_of[ends[0]] = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (log_of[ends[0]] < 0) fail(path);
    return ends[1];
}

static void capture(int pipe) {
    static char chunk[CHUNK];
    ssize_t size = read(pipe, chunk, sizeof chunk);
    for (ssize_t at = 0, written; at < size; at += written)
        if ((written = write(log_of[pipe], chunk + at, size - at)) < 0) fail("write");
    if (size > 0) return;
    close(log_of[pipe]);
    close(pipe);
    log_of[pipe] = 0;
}

static void start(struct job *job) {
    int out = folder ? output(job) : null;
    pid_t pid = vfork();
    if (pid < 0) fail("vfork");
    if (pid == 0) {
        sigprocmask(SIG_UNBLOCK, &handled, NULL);
        setpgid(0, 0);
        for (int fd = 0; fd < 3; fd++) dup2(fd ? out : null, fd);
        execve(job->argv[0], job->argv, environ);
        _exit(127);
    }
    if (out != null) close(out);
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

int main(int argc, char **argv) {
    if (argc != 3 && argc != 4) return fputs("usage: floor SOCKET LIST [FOLDER]\n", stderr), 2;
    read_list(argv[2]);
    folder = argv[3];
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

    int more = 0;
    poll = epoll_create1(EPOLL_CLOEXEC);
    if (watch(signals) || watch(listener)) fail("epoll");
    for (int i = 0; i < count; i++) start(&jobs[i]);

    while (!stopping || alive) {
        struct epoll_event events[16];
        int ready = epoll_wait(poll, events, 16, more ? 0 : -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                watch(accept4(listener, NULL, NULL, SOCK_CLOEXEC));
            } else if (fd == signals) {
                struct signalfd_siginfo info;
                if (read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == SIGTERM) stop();
                more = 1;
            } else if (log_of[fd]) {
                capture(fd);
            } else {
                answer(fd);
            }
        }
        if (more) more = reap();
    }
    return 0;
}
