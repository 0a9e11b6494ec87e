/* A server that only records: what arrives when, and answers as an engine streams, on one core.
 *
 *     cc -O2 -o loadgen_sink loadgen_sink.c
 *     ./loadgen_sink [--port 0] [--interval-ms 5] [--processes 1] [--out FILE]
 *
 * POST /v1/completions and /v1/chat/completions over HTTP/1.1: as many content events as max_tokens says,
 * interval-ms apart, each written by itself, the first one interval after the request; [DONE] with the last, and
 * usage where "include_usage" asks for it. Without "stream": true one answer at the end. GET of anything else: a short page.
 * Prints "listening on http://127.0.0.1:PORT". On SIGTERM it writes the records of all requests to FILE (with several
 * processes to FILE.0, FILE.1 ...: the kernel deals the connections out) and prints for each process one line
 * of JSON: its CPU seconds, events written, and how late they were written.
 *
 * A record is 32 bytes, little endian: arrival_ns and done_ns (CLOCK_MONOTONIC when the kernel had what the
 * first read of the request took, and after the last write; 0: not finished), number (the request's "seed", -1 without one),
 * max_tokens, tokens written (int32 both).
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_EVENTS 256
#define DUE_AT_A_TIME 32 /* then sockets are looked at: a request must not wait behind many writes */
#define LATE_BINS 200000 /* of 1 us */
#define READ_BYTES 65536

struct record {
    int64_t arrival_ns, done_ns, number;
    int32_t max_tokens, sent_tokens;
};

struct connection {
    int fd, streaming, chat, usage, one_answer, closed, is_listener;
    char *in;
    size_t in_bytes, in_room, out_offset;
    int64_t arrival_ns, due_ns;
    int64_t record;
    int prompt_tokens, blocked;
    struct connection *next;
};

static struct record *records;
static int64_t records_count, records_room;
static struct connection *first_due, *last_due;
static int64_t interval_ns = 5000000;
static int64_t late_us[LATE_BINS];
static int64_t events_written, times_blocked, open_now, open_most;
static volatile sig_atomic_t ending;
static const char *out_path;
static pid_t children[64];
static int children_count;

static const char HEAD[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    "Transfer-Encoding: chunked\r\n\r\n";
static char event_text[2][512], last_text[2][512];
static size_t event_bytes[2];

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void on_signal(int number) {
    (void)number;
    ending = 1;
    for (int i = 0; i < children_count; i++) kill(children[i], SIGTERM);
}

/* ---- what is said */

static void make_texts(void) {
    static const char *kind[] = {"text_completion", "chat.completion.chunk"};
    static const char *words[] = {"\"text\":\" w1\"", "\"delta\":{\"content\":\" w1\"}"};
    for (int chat = 0; chat < 2; chat++) {
        char data[400];
        const char *form =
            "data: {\"id\":\"cmpl-0\",\"object\":\"%s\",\"created\":1,\"model\":\"sink\","
            "\"choices\":[{\"index\":0,%s,\"logprobs\":null,\"finish_reason\":%s}]}\n\n";
        int n = snprintf(data, sizeof data, form, kind[chat], words[chat], "null");
        event_bytes[chat] =
            (size_t)snprintf(event_text[chat], sizeof event_text[chat], "%x\r\n%s\r\n", n, data);
        snprintf(last_text[chat], sizeof last_text[chat], form, kind[chat], words[chat], "\"length\"");
    }
}

static void page(struct connection *c, int status, const char *type, const char *body) {
    char text[2048];
    int n = snprintf(text, sizeof text,
                     "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n%s", status,
                     status == 200 ? "OK" : "Not Found", type, strlen(body), body);
    if (send(c->fd, text, (size_t)n, MSG_NOSIGNAL) < 0) c->blocked++;
}

static size_t ending_text(struct connection *c, char *text, size_t room) {
    char data[1024];
    int n = !c->usage ? snprintf(data, sizeof data, "%sdata: [DONE]\n\n", last_text[c->chat])
                      : snprintf(data, sizeof data,
                     "%sdata: {\"id\":\"cmpl-0\",\"object\":\"%s\",\"created\":1,\"model\":\"sink\","
                     "\"choices\":[],\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d,"
                     "\"completion_tokens\":%d}}\n\ndata: [DONE]\n\n",
                     last_text[c->chat], c->chat ? "chat.completion.chunk" : "text_completion",
                     c->prompt_tokens, c->prompt_tokens + records[c->record].max_tokens,
                     records[c->record].max_tokens);
    return (size_t)snprintf(text, room, "%x\r\n%s\r\n0\r\n\r\n", n, data);
}

static void one_answer(struct connection *c) {
    struct record *r = &records[c->record];
    char body[512];
    snprintf(body, sizeof body,
             "{\"id\":\"cmpl-0\",\"object\":\"%s\",\"created\":1,\"model\":\"sink\",\"choices\":["
             "{\"index\":0,%s,\"finish_reason\":\"length\"}],\"usage\":{\"prompt_tokens\":%d,"
             "\"completion_tokens\":%d,\"total_tokens\":%d}}",
             c->chat ? "chat.completion" : "text_completion",
             c->chat ? "\"message\":{\"role\":\"assistant\",\"content\":\"w1\"}" : "\"text\":\" w1\"",
             c->prompt_tokens, r->max_tokens, r->max_tokens + c->prompt_tokens);
    page(c, 200, "application/json", body);
}

/* ---- streams: all have the same interval, so a queue in order of arrival is one in order of time */

static void enqueue(struct connection *c, int64_t due_ns) {
    c->due_ns = due_ns;
    c->next = NULL;
    if (last_due) last_due->next = c; else first_due = c;
    last_due = c;
}

static void read_requests(struct connection *c);

static void finished(struct connection *c) {
    struct record *r = &records[c->record];
    r->sent_tokens = r->max_tokens;
    r->done_ns = now_ns();
    c->streaming = 0;
    open_now--;
    read_requests(c);
}

/* Write the event that is due. A socket that takes no more is tried again an interval later. */
static void write_event(struct connection *c) {
    struct record *r = &records[c->record];
    int last = r->sent_tokens + 1 >= r->max_tokens;
    char text[1600];
    const char *from = event_text[c->chat];
    size_t bytes = event_bytes[c->chat];
    if (last && c->one_answer) {
        one_answer(c);
        finished(c);
        return;
    }
    if (last) {
        bytes = ending_text(c, text, sizeof text);
        from = text;
    }
    if (!c->one_answer) {
        ssize_t n = send(c->fd, from + c->out_offset, bytes - c->out_offset, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 || (size_t)n < bytes - c->out_offset) {
            if (n > 0) c->out_offset += (size_t)n;
            times_blocked++;
            enqueue(c, c->due_ns + interval_ns);
            return;
        }
        events_written++;
    }
    c->out_offset = 0;
    if (last) {
        finished(c);
        return;
    }
    r->sent_tokens++;
    enqueue(c, c->due_ns + interval_ns);
}

static void write_due(void) {
    int64_t now = now_ns();
    for (int n = 0; n < DUE_AT_A_TIME && first_due && first_due->due_ns <= now; n++) {
        struct connection *c = first_due;
        first_due = c->next;
        if (!first_due) last_due = NULL;
        if (c->closed) {
            open_now--;
            free(c->in);
            free(c);
            continue;
        }
        int64_t late = (now - c->due_ns) / 1000;
        late_us[late < LATE_BINS ? late : LATE_BINS - 1]++;
        write_event(c);
    }
}

/* ---- requests */

static const char *after(const char *body, const char *key) {
    const char *at = strstr(body, key);
    if (!at) return NULL;
    at += strlen(key);
    while (*at == ' ' || *at == ':') at++;
    return at;
}

static int count_tokens(const char *body) {
    const char *at = after(body, "\"prompt\"");
    int many = 1;
    if (!at) at = after(body, "\"content\"");
    if (!at) return 0;
    char last = *at == '[' ? ']' : '"', between = *at == '[' ? ',' : ' ';
    for (at++; *at && *at != last; at++) many += *at == between;
    return many;
}

static void begin_stream(struct connection *c, const char *body, int chat) {
    if (records_count == records_room) {
        records_room = records_room ? 2 * records_room : 65536;
        records = realloc(records, (size_t)records_room * sizeof *records);
        if (!records) fail("records");
    }
    const char *most = after(body, "\"max_tokens\"");
    if (!most) most = after(body, "\"max_completion_tokens\"");
    const char *number = after(body, "\"seed\"");
    const char *stream = after(body, "\"stream\"");
    struct record *r = &records[records_count];
    *r = (struct record){.arrival_ns = c->arrival_ns, .number = -1, .max_tokens = most ? atoi(most) : 16};
    if (r->max_tokens < 1) r->max_tokens = 1;
    if (number && *number >= '0' && *number <= '9') r->number = atoll(number);
    c->record = records_count++;
    c->chat = chat;
    c->usage = strstr(body, "\"include_usage\"") != NULL;
    c->one_answer = !(stream && *stream == 't');
    c->prompt_tokens = count_tokens(body);
    c->streaming = 1;
    c->out_offset = 0;
    if (++open_now > open_most) open_most = open_now;
    if (!c->one_answer && send(c->fd, HEAD, sizeof HEAD - 1, MSG_NOSIGNAL) < 0) c->blocked++;
    enqueue(c, c->arrival_ns + interval_ns);
}

static void answer(struct connection *c, const char *head, const char *body) {
    if (!strncmp(head, "POST /v1/completions", 20)) begin_stream(c, body, 0);
    else if (!strncmp(head, "POST /v1/chat/completions", 25)) begin_stream(c, body, 1);
    else if (!strncmp(head, "GET /v1/models", 14) || !strncmp(head, "GET /models", 11))
        page(c, 200, "application/json",
             "{\"object\":\"list\",\"data\":[{\"id\":\"sink\",\"object\":\"model\",\"created\":1,"
             "\"owned_by\":\"sink\",\"root\":\"sink\",\"max_model_len\":1000000}]}");
    else if (!strncmp(head, "GET /metrics", 12)) {
        char text[256];
        snprintf(text, sizeof text,
                 "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{model_name=\"sink\"} "
                 "%lld\n# TYPE sink_requests_total counter\nsink_requests_total %lld\n",
                 (long long)open_now, (long long)records_count);
        page(c, 200, "text/plain; version=0.0.4; charset=utf-8", text);
    } else if (!strncmp(head, "GET /health", 11) || !strncmp(head, "GET /ping", 9))
        page(c, 200, "application/json", "{}");
    else page(c, 404, "application/json", "{\"error\":{\"message\":\"the sink has no such page\"}}");
}

/* All whole requests that are there; one at a time, the next after its answer. */
static void read_requests(struct connection *c) {
    while (!c->streaming && c->in_bytes) {
        char *end = memmem(c->in, c->in_bytes, "\r\n\r\n", 4);
        if (!end) return;
        char *body = end + 4;
        *end = 0;
        char *length = strcasestr(c->in, "\r\ncontent-length:");
        size_t body_bytes = length ? strtoull(length + 17, NULL, 10) : 0;
        size_t all = (size_t)(body - c->in) + body_bytes;
        if (c->in_bytes < all) {
            *end = '\r';
            return;
        }
        char kept = c->in[all]; /* there is always room for one byte more */
        c->in[all] = 0;
        answer(c, c->in, body);
        c->in[all] = kept;
        c->in_bytes -= all;
        memmove(c->in, c->in + all, c->in_bytes);
    }
    if (!c->in_bytes && c->in_room > READ_BYTES) {
        free(c->in);
        c->in = NULL;
        c->in_room = 0;
    }
}

static void closed(struct connection *c, int epoll) {
    epoll_ctl(epoll, EPOLL_CTL_DEL, c->fd, NULL);
    close(c->fd);
    c->closed = 1;
    if (!c->streaming) { /* else the queue still holds it */
        free(c->in);
        free(c);
    }
}

/* When the bytes of a read arrived, by the kernel's stamp in the clock of the day: however late the read is. */
static int64_t arrived_ns(struct msghdr *message) {
    int64_t now = now_ns();
    for (struct cmsghdr *note = CMSG_FIRSTHDR(message); note; note = CMSG_NXTHDR(message, note)) {
        if (note->cmsg_level != SOL_SOCKET || note->cmsg_type != SCM_TIMESTAMPNS) continue;
        struct timespec stamp, day;
        memcpy(&stamp, CMSG_DATA(note), sizeof stamp);
        clock_gettime(CLOCK_REALTIME, &day);
        int64_t ago = (int64_t)(day.tv_sec - stamp.tv_sec) * 1000000000 + day.tv_nsec - stamp.tv_nsec;
        return ago > 0 ? now - ago : now;
    }
    return now;
}

static void readable(struct connection *c, int epoll) {
    static char bytes[READ_BYTES];
    char notes[CMSG_SPACE(sizeof(struct timespec))];
    struct iovec room = {bytes, sizeof bytes};
    struct msghdr message = {
        .msg_iov = &room, .msg_iovlen = 1, .msg_control = notes, .msg_controllen = sizeof notes};
    ssize_t n = recvmsg(c->fd, &message, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) {
        closed(c, epoll);
        return;
    }
    if (!c->in_bytes) c->arrival_ns = arrived_ns(&message);
    if (c->in_bytes + (size_t)n + 1 > c->in_room) {
        c->in_room = 2 * (c->in_bytes + (size_t)n) + 1;
        c->in = realloc(c->in, c->in_room);
        if (!c->in) fail("request");
    }
    memcpy(c->in + c->in_bytes, bytes, (size_t)n);
    c->in_bytes += (size_t)n;
    read_requests(c);
}

static void accept_all(int listener, int epoll) {
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct connection *c = calloc(1, sizeof *c);
        if (!c) fail("connection");
        c->fd = fd;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
    }
    if (errno == EMFILE || errno == ENFILE) fail("accept: raise the limit of open files");
}

/* ---- life */

static int listen_on(int port, int *bound) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    socklen_t bytes = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one); /* and each connection made of it */
    if (bind(fd, (struct sockaddr *)&address, bytes)) fail("bind");
    if (listen(fd, 65535)) fail("listen");
    getsockname(fd, (struct sockaddr *)&address, &bytes);
    *bound = ntohs(address.sin_port);
    return fd;
}

static void serve(int listener) {
    int epoll = epoll_create1(0);
    struct connection itself = {.fd = listener, .is_listener = 1};
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &itself}, events[MAX_EVENTS];
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event)) fail("epoll");
    while (!ending) {
        write_due();
        int64_t wait_ns = first_due ? first_due->due_ns - now_ns() : 100000000;
        if (wait_ns < 0) wait_ns = 0;
        struct timespec wait = {.tv_sec = wait_ns / 1000000000, .tv_nsec = wait_ns % 1000000000};
        int n = epoll_pwait2(epoll, events, MAX_EVENTS, &wait, NULL);
        if (n < 0 && errno != EINTR) fail("epoll_pwait2");
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (c->is_listener) accept_all(listener, epoll); else readable(c, epoll);
        }
    }
}

static double quantile_us(double q) {
    int64_t total = 0, seen = 0;
    for (int i = 0; i < LATE_BINS; i++) total += late_us[i];
    for (int i = 0; i < LATE_BINS; i++)
        if ((seen += late_us[i]) >= q * (double)total && seen) return i;
    return 0;
}

static void report(int number, int processes) {
    char path[4096];
    if (out_path) {
        snprintf(path, sizeof path, processes > 1 ? "%s.%d" : "%s", out_path, number);
        FILE *out = fopen(path, "wb");
        if (!out) fail(path);
        fwrite(records, sizeof *records, (size_t)records_count, out);
        if (fclose(out)) fail(path);
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("{\"cpu_s\": %.6f, \"peak_bytes\": %ld, \"requests\": %lld, \"events\": %lld, \"blocked\": %lld, "
           "\"open_most\": %lld, \"late_p50_us\": %.0f, \"late_p99_us\": %.0f, \"late_max_us\": %.0f}\n",
           (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
               (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6,
           used.ru_maxrss * 1024, (long long)records_count, (long long)events_written, (long long)times_blocked,
           (long long)open_most, quantile_us(0.5), quantile_us(0.99), quantile_us(1.0));
    fflush(stdout);
}

int main(int count, char **words) {
    int port = 0, processes = 1;
    for (int i = 1; i + 1 < count; i += 2) {
        if (!strcmp(words[i], "--port")) port = atoi(words[i + 1]);
        else if (!strcmp(words[i], "--interval-ms")) interval_ns = (int64_t)(1e6 * atof(words[i + 1]));
        else if (!strcmp(words[i], "--processes")) processes = atoi(words[i + 1]);
        else if (!strcmp(words[i], "--out")) out_path = words[i + 1];
        else { fprintf(stderr, "%s is not known\n", words[i]); return 2; }
    }
    if (count % 2 == 0 || processes < 1 || processes > 64 || interval_ns < 1) {
        fprintf(stderr, "see the head of loadgen_sink.c\n");
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    make_texts();
    int listeners[64];
    for (int i = 0; i < processes; i++) listeners[i] = listen_on(port, &port);
    printf("listening on http://127.0.0.1:%d\n", port);
    fflush(stdout);
    for (int i = 1; i < processes; i++) {
        pid_t child = fork();
        if (child < 0) fail("fork");
        if (!child) {
            children_count = 0;
            prctl(PR_SET_PDEATHSIG, SIGTERM);
            for (int j = 0; j < processes; j++)
                if (j != i) close(listeners[j]);
            serve(listeners[i]);
            report(i, processes);
            return 0;
        }
        children[children_count++] = child;
    }
    for (int j = 1; j < processes; j++) close(listeners[j]);
    serve(listeners[0]);
    while (wait(NULL) > 0) {}
    report(0, processes);
    return 0;
}
