/* mqttload: a neutral MQTT 3.1.1/5 load generator (single thread, epoll, loopback).
 *
 *   cc -O2 -o mqttload mqttload.c                                  without TLS
 *   cc -O2 -DWITH_TLS -o mqttload mqttload.c -lssl -lcrypto        with --tls (certificates are not verified)
 *
 *   mqttload flow    closed loop: publishers keep at most --window messages undelivered; lossless throughput
 *   mqttload rate    open loop at --rate msg/s: latency percentiles under a fixed load
 *   mqttload idle    opens --conns connections (optionally subscribed) and reports the broker's memory
 *   mqttload churn   one connection that subscribes to and leaves --rate filters a second, for --seconds
 *
 * With --persistent subscribers have persistent sessions; with --offline they leave before the load begins, so that it
 * all queues, and what bounds the loop is acknowledgements; with --acks the percentiles are those from PUBLISH to its
 * acknowledgement instead of to its delivery.
 *
 * With --groups N the topics are PREFIX/GROUP/k/telemetry: publisher i sends to the topics of group i mod N, subscriber
 * i takes PREFIX/GROUP/+/telemetry of group i mod N; GROUP is g0…, or with --user NAME the user names NAME0…, and each
 * connection then logs in as its group.
 *
 * Figures: delivered msg/s (wall), and, with --pid (once for each process of the installation), the CPU seconds of
 * those processes (user+sys, all threads) so that msg per broker-CPU-second can be compared on a noisy machine.
 * With --v5 the server's Receive Maximum is honoured.
 * A run that loses or reorders a message per (publisher, topic) says so and exits 1.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <dirent.h>
#ifdef WITH_TLS
#include <openssl/ssl.h>
#include <openssl/err.h>
static SSL_CTX *tls;
#else
typedef void SSL;
#endif

typedef struct { uint8_t *p; uint32_t cap, off, len; } Buf;         /* bytes [off, off+len) are live */
typedef struct {
    int fd; int pub; int id; int want_write; int connected; int subscribed; uint32_t most;
    Buf in, out;
    uint16_t next_pid; uint32_t inflight; uint64_t seq; uint32_t sid;
    SSL *ssl; uint64_t *sent_at;                                     /* [packet identifier], with --acks */
} Conn;

static const char *host = "127.0.0.1", *user = NULL, *pass = NULL, *prefix = "load";
static int port = 1883, npub = 1, nsub = 1, ntopics = 1, qos = 0, subqos = -1, size = 64, version = 4;
static int persistent = 0, offline = 0, ack_times = 0, churning = 0, groups = 0, window = 1000, conns = 1000, subscribe_idle = 0, nsrc = 1, shared_sub = 0, retain = 0, alltopics = 0;
static double seconds = 5, rate = 1000, warm = 1, ramp = 0;
static int pids[64], npids;
static Conn *cs; static int nc, ep;
static uint64_t sent, acked, received, lost, reordered, refused, closed_by_peer;
static uint64_t *last_seq;                                          /* [sub][pub] last sequence seen per pair */
static uint64_t *hist; enum { HB = 40 * 64 };

static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static uint64_t now_ns(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec; }
static void die(const char *m) { fprintf(stderr, "mqttload: %s (%s)\n", m, strerror(errno)); exit(2); }

static void room(Buf *b, uint32_t n) {
    if (b->off + b->len + n <= b->cap) return;
    if (b->off) { memmove(b->p, b->p + b->off, b->len); b->off = 0; }
    if (b->len + n > b->cap) { uint32_t c = b->cap ? b->cap : 256; while (c < b->len + n) c *= 2; b->p = realloc(b->p, c); if (!b->p) die("memory"); b->cap = c; }
}
static uint8_t *tail(Buf *b, uint32_t n) { room(b, n); uint8_t *r = b->p + b->off + b->len; b->len += n; return r; }
static int put_len(uint8_t *p, uint32_t n) { int i = 0; do { uint8_t d = n & 127; n >>= 7; if (n) d |= 128; p[i++] = d; } while (n); return i; }
static uint8_t *put_str(uint8_t *p, const char *s) { uint16_t n = strlen(s); *p++ = n >> 8; *p++ = n; memcpy(p, s, n); return p + n; }

/* hdr-like histogram: 64 linear steps per power of two of nanoseconds */
static void record(uint64_t ns) { int e = ns < 64 ? 0 : 63 - __builtin_clzll(ns) - 5; uint64_t i = ns >> e; int k = e * 64 + (int)(i & 63) ; if (e) k = e * 64 + (int)(i - 32); if (k >= HB) k = HB - 1; hist[k]++; }
static double hist_value(int k) { int e = k / 64, i = k % 64; return e ? (double)((uint64_t)(i + 32) << e) : i; }
static double quantile(double q) { uint64_t n = 0, c = 0; for (int i = 0; i < HB; i++) n += hist[i]; for (int i = 0; i < HB; i++) { c += hist[i]; if (c >= q * n && n) return hist_value(i) / 1e3; } return 0; }

static double cpu_of(int pid) {                                     /* user+system seconds of the process, all its threads */
    char f[64], b[1024]; snprintf(f, sizeof f, "/proc/%d/stat", pid);
    int fd = open(f, O_RDONLY); if (fd < 0) return 0; int n = read(fd, b, sizeof b - 1); close(fd); if (n <= 0) return 0; b[n] = 0;
    char *p = strrchr(b, ')'); unsigned long u, s;
    if (!p || sscanf(p + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &u, &s) != 2) return 0;
    return (double)(u + s) / sysconf(_SC_CLK_TCK);
}
static double rss_mb(int pid) { char f[64], l[256]; snprintf(f, sizeof f, "/proc/%d/status", pid); FILE *h = fopen(f, "r"); if (!h) return 0; double v = 0; while (fgets(l, sizeof l, h)) if (!strncmp(l, "VmRSS:", 6)) v = atof(l + 6) / 1024; fclose(h); return v; }
static double tcp_mem_mb(void) { FILE *h = fopen("/proc/net/sockstat", "r"); char l[256]; double v = 0; if (!h) return 0; while (fgets(l, sizeof l, h)) if (!strncmp(l, "TCP:", 4)) { char *m = strstr(l, "mem "); if (m) v = atof(m + 4) * 4096 / 1048576; } fclose(h); return v; }
static double broker_cpu(void) { double s = 0; for (int i = 0; i < npids; i++) s += cpu_of(pids[i]); return s; }
static double broker_rss(void) { double s = 0; for (int i = 0; i < npids; i++) s += rss_mb(pids[i]); return s; }

/* send and recv, or the same through TLS; -1 with EAGAIN when it has to wait, EINPROGRESS_READ when TLS waits for its peer */
enum { EINPROGRESS_READ = 100000 };
#ifdef WITH_TLS
static ssize_t tls_result(Conn *c, int n, int writing) {
    if (n > 0) return n;
    switch (SSL_get_error(c->ssl, n)) {
    case SSL_ERROR_WANT_READ: errno = writing ? EINPROGRESS_READ : EAGAIN; return -1;
    case SSL_ERROR_WANT_WRITE: errno = EAGAIN; return -1;
    case SSL_ERROR_ZERO_RETURN: return 0;
    default: errno = ECONNRESET; return -1;
    }
}
static ssize_t put(Conn *c, const void *p, size_t n) { if (!c->ssl) return send(c->fd, p, n, MSG_NOSIGNAL | MSG_DONTWAIT); ERR_clear_error(); return tls_result(c, SSL_write(c->ssl, p, n), 1); }
static ssize_t get(Conn *c, void *p, size_t n) { if (!c->ssl) return recv(c->fd, p, n, MSG_DONTWAIT); ERR_clear_error(); return tls_result(c, SSL_read(c->ssl, p, n), 0); }
#else
static ssize_t put(Conn *c, const void *p, size_t n) { return send(c->fd, p, n, MSG_NOSIGNAL | MSG_DONTWAIT); }
static ssize_t get(Conn *c, void *p, size_t n) { return recv(c->fd, p, n, MSG_DONTWAIT); }
#endif

static void flush(Conn *c) {
    while (c->out.len) {
        ssize_t n = put(c, c->out.p + c->out.off, c->out.len);
        if (n < 0 && errno == EINPROGRESS_READ) { if (c->want_write) { struct epoll_event e = { EPOLLIN, { .ptr = c } }; epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &e); c->want_write = 0; } return; }
        if (n < 0) {
            if (errno == EAGAIN || errno == EINPROGRESS || errno == ENOTCONN) { if (!c->want_write) { struct epoll_event e = { EPOLLIN | EPOLLOUT, { .ptr = c } }; epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &e); c->want_write = 1; } return; }
            closed_by_peer++; c->out.len = 0; return;
        }
        c->out.off += n; c->out.len -= n;
    }
    c->out.off = 0;
    if (c->want_write) { struct epoll_event e = { EPOLLIN, { .ptr = c } }; epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &e); c->want_write = 0; }
}

static void send_connect(Conn *c) {
    uint8_t b[512 + (pass ? strlen(pass) : 0)], *p = b; char id[64]; snprintf(id, sizeof id, "%s-%s-%d", prefix, churning ? "c" : c->pub ? "p" : "s", c->id);
    p = put_str(p, "MQTT"); *p++ = version; *p++ = (persistent && !c->pub ? (version == 5 ? 2 : 0) : 2) | (user ? 0x80 : 0) | (pass ? 0x40 : 0); *p++ = 0; *p++ = 0;
    if (version == 5) { int keep = persistent && !c->pub; *p++ = keep ? 8 : 3; *p++ = 0x21; *p++ = 0xff; *p++ = 0xff; if (keep) { *p++ = 0x11; *p++ = 0; *p++ = 0; *p++ = 0x0e; *p++ = 0x10; } }
    char name[128]; if (user && groups) snprintf(name, sizeof name, "%s%d", user, c->id % groups); else snprintf(name, sizeof name, "%s", user ? user : "");
    p = put_str(p, id); if (user) p = put_str(p, name); if (pass) p = put_str(p, pass);
    uint8_t h[8]; h[0] = 0x10; int n = 1 + put_len(h + 1, p - b);
    memcpy(tail(&c->out, n), h, n); memcpy(tail(&c->out, p - b), b, p - b); flush(c);
}
static void topic_name(char *t, size_t n, int k) { snprintf(t, n, "%s/%d/telemetry", prefix, k); }
static void group_name(char *t, size_t n, int g) { snprintf(t, n, "%s/%s%d", prefix, user ? user : "g", g); }
static void send_subscribe(Conn *c) {
    uint8_t b[512], *p = b; char t[128], f[160]; *p++ = 0; *p++ = 1; if (version == 5) *p++ = 0;
    if (groups) { char g[64]; group_name(g, sizeof g, c->id % groups); snprintf(t, sizeof t, "%s/+/telemetry", g); }
    else if (alltopics) snprintf(t, sizeof t, "%s/+/telemetry", prefix); else topic_name(t, sizeof t, c->id % ntopics);
    if (shared_sub) snprintf(f, sizeof f, "$share/g/%s", t); else snprintf(f, sizeof f, "%s", t);
    p = put_str(p, f); *p++ = subqos;
    uint8_t h[8]; h[0] = 0x82; int n = 1 + put_len(h + 1, p - b);
    memcpy(tail(&c->out, n), h, n); memcpy(tail(&c->out, p - b), b, p - b); flush(c);
}
static void send_publish(Conn *c) {
    char t[128];
    if (groups) { char g[64]; group_name(g, sizeof g, c->id % groups); snprintf(t, sizeof t, "%s/%d/telemetry", g, (int)(c->seq % (uint64_t)(ntopics / groups ? ntopics / groups : 1))); }
    else topic_name(t, sizeof t, (c->id + (int)(c->seq * npub)) % ntopics);
    uint16_t tl = strlen(t);
    uint32_t rl = 2 + tl + (qos ? 2 : 0) + (version == 5 ? 1 : 0) + size;
    uint8_t h[8]; h[0] = 0x30 | qos << 1 | retain; int n = 1 + put_len(h + 1, rl);
    uint8_t *p = tail(&c->out, n + rl); memcpy(p, h, n); p += n; p = put_str(p, t);
    if (qos) { if (!++c->next_pid) c->next_pid = 1; *p++ = c->next_pid >> 8; *p++ = c->next_pid; c->inflight++; if (ack_times) { if (!c->sent_at) c->sent_at = calloc(65536, 8); c->sent_at[c->next_pid] = now_ns(); } }
    if (version == 5) *p++ = 0;
    c->seq++; uint64_t ts = now_ns(), sq = c->seq; uint32_t id = c->id;
    memset(p, 'x', size); memcpy(p, &ts, 8); memcpy(p + 8, &sq, 8); memcpy(p + 16, &id, 4); sent++;
}
static void ack(Conn *c, uint8_t type, uint16_t pid) { uint8_t *p = tail(&c->out, 4); p[0] = type; p[1] = 2; p[2] = pid >> 8; p[3] = pid; }

static void on_publish(Conn *c, uint8_t h, uint8_t *p, uint32_t n) {
    uint16_t tl = p[0] << 8 | p[1]; uint32_t o = 2 + tl; int q = (h >> 1) & 3; uint16_t pid = 0;
    if (q) { pid = p[o] << 8 | p[o + 1]; o += 2; }
    if (version == 5) { uint32_t v = 0; int s = 0; do { v |= (uint32_t)(p[o] & 127) << s; s += 7; } while (p[o++] & 128); o += v; }
    if (n - o >= 20) {
        uint64_t ts, sq; uint32_t id; memcpy(&ts, p + o, 8); memcpy(&sq, p + o + 8, 8); memcpy(&id, p + o + 16, 4);
        if (!ack_times) record(now_ns() - ts);
        if (last_seq && !shared_sub && (int)id < npub) { uint64_t *l = &last_seq[(uint64_t)c->id * npub + id]; if (sq <= *l) reordered++; *l = sq; }
    }
    received++;
    if (q == 1) ack(c, 0x40, pid); else if (q == 2) ack(c, 0x50, pid);
}
/* Receive Maximum of an MQTT 5 CONNACK: how many QoS 1 and 2 messages we may have unacknowledged; 60 000 where it is absent */
static uint32_t receive_maximum(const uint8_t *p, uint32_t n) {
    uint32_t o = 2, v = 0; int s = 0; if (version != 5 || n < 3) return 60000;
    do { v |= (uint32_t)(p[o] & 127) << s; s += 7; } while (p[o++] & 128 && o < n);
    for (uint32_t end = o + v < n ? o + v : n; o < end;) switch (p[o++]) {
        case 0x21: return o + 2 <= end ? (uint32_t)(p[o] << 8 | p[o + 1]) : 60000;
        case 0x24: case 0x25: case 0x28: case 0x29: case 0x2a: o += 1; break;
        case 0x13: case 0x22: o += 2; break;
        case 0x11: case 0x27: o += 4; break;
        case 0x26: for (int k = 0; k < 2; k++) o += 2 + (p[o] << 8 | p[o + 1]); break;
        default: o += 2 + (p[o] << 8 | p[o + 1]); break;             /* strings and binary data */
    }
    return 60000;
}
static void on_packet(Conn *c, uint8_t h, uint8_t *p, uint32_t n) {
    switch (h >> 4) {
    case 2: if (n < 2 || p[1]) { refused++; return; } c->connected = 1; c->most = receive_maximum(p, n); if (!c->pub) { if (subqos >= 0 && !(conns < 0)) send_subscribe(c); } break;
    case 3: on_publish(c, h, p, n); break;
    case 4: c->inflight--; acked++; if (c->sent_at) record(now_ns() - c->sent_at[p[0] << 8 | p[1]]); break;
    case 5: if (c->sent_at) record(now_ns() - c->sent_at[p[0] << 8 | p[1]]); if (n > 2 && p[2] >= 0x80) { c->inflight--; acked++; break; } ack(c, 0x62, p[0] << 8 | p[1]); break;
    case 6: ack(c, 0x70, p[0] << 8 | p[1]); break;
    case 7: c->inflight--; acked++; break;
    case 9: c->subscribed = 1; acked++; if (p[n - 1] & 0x80) { fprintf(stderr, "mqttload: SUBACK refused\n"); exit(2); } break;
    default: break;
    }
}
static void on_readable(Conn *c) {
    for (int k = 0; k < (c->ssl ? 16 : 4); k++) {
        room(&c->in, 65536);
        ssize_t n = get(c, c->in.p + c->in.off + c->in.len, 65536);
        if (n < 0) { if (errno != EAGAIN) { closed_by_peer++; epoll_ctl(ep, EPOLL_CTL_DEL, c->fd, NULL); } break; }
        if (n == 0) { closed_by_peer++; epoll_ctl(ep, EPOLL_CTL_DEL, c->fd, NULL); break; }
        c->in.len += n;
        for (;;) {
            uint8_t *p = c->in.p + c->in.off; uint32_t l = c->in.len, v = 0, i = 1; int s = 0, ok = 0;
            while (i < l && i < 5) { v |= (uint32_t)(p[i] & 127) << s; s += 7; if (!(p[i++] & 128)) { ok = 1; break; } }
            if (!ok || l < i + v) break;
            on_packet(c, p[0], p + i, v); c->in.off += i + v; c->in.len -= i + v;
        }
        if (!c->in.len) c->in.off = 0;
        if (n < 65536 && !c->ssl) break;                             /* a TLS record is smaller: go on until there is none */
    }
    flush(c);
    if (conns > 0 && c->in.len == 0 && npids && hist == NULL) { free(c->in.p); memset(&c->in, 0, sizeof c->in); }
}
static void poll_once(int ms) {
    struct epoll_event ev[512]; int n = epoll_wait(ep, ev, 512, ms);
    for (int i = 0; i < n; i++) { Conn *c = ev[i].data.ptr; if (ev[i].events & EPOLLOUT) flush(c); if (ev[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP)) on_readable(c); }
}
static Conn *open_conn(int i, int pub, int id) {
    Conn *c = &cs[i]; c->pub = pub; c->id = id;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0); if (c->fd < 0) die("socket");
    int one = 1; setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (nsrc > 1) { struct sockaddr_in s = { .sin_family = AF_INET }; s.sin_addr.s_addr = htonl(0x7f000002u + i % nsrc); int on = 1; setsockopt(c->fd, SOL_IP, 24 /* IP_BIND_ADDRESS_NO_PORT */, &on, sizeof on); if (bind(c->fd, (void *)&s, sizeof s)) die("bind"); }
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(port) }; inet_pton(AF_INET, host, &a.sin_addr);
    if (connect(c->fd, (void *)&a, sizeof a) && errno != EINPROGRESS) die("connect");
#ifdef WITH_TLS
    if (tls) { c->ssl = SSL_new(tls); if (!c->ssl || !SSL_set_fd(c->ssl, c->fd)) die("TLS"); SSL_set_connect_state(c->ssl); }
#endif
    struct epoll_event e = { EPOLLIN | EPOLLOUT, { .ptr = c } }; epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &e); c->want_write = 1; send_connect(c); nc++;
    return c;
}
static void connect_all(int n, int first_sub) {
    int up = 0; double t0 = now(); int opened = 0;
    while (up < n) {
        for (int k = 0; k < 64 && opened < n && opened - up < 512; k++) { int pub = opened >= first_sub; open_conn(opened, pub, pub ? opened - first_sub : opened); opened++; if (ramp > 0) { while (now() - t0 < opened / ramp) poll_once(1); } }
        poll_once(opened - up >= 512 || opened == n ? 50 : 0);
        if (opened - up >= 256 || opened == n) { up = 0; for (int i = 0; i < opened; i++) up += cs[i].pub || subqos < 0 ? cs[i].connected : cs[i].subscribed; }
        if (refused) { fprintf(stderr, "mqttload: %llu connections refused\n", (unsigned long long)refused); exit(2); }
        if (now() - t0 > 600) { fprintf(stderr, "mqttload: only %d of %d connected\n", up, n); exit(2); }
        if (closed_by_peer) { fprintf(stderr, "mqttload: peer closed %llu while connecting\n", (unsigned long long)closed_by_peer); exit(2); }
    }
}
/* one connection that subscribes and unsubscribes at a fixed rate */
static void send_filter(Conn *c, int first, uint16_t pid, uint64_t k) {
    uint8_t b[512], *p = b; char f[160]; *p++ = pid >> 8; *p++ = pid; if (version == 5) *p++ = 0;
    snprintf(f, sizeof f, "%s/churn/%llu/+", prefix, (unsigned long long)(k % 1000)); p = put_str(p, f); if (first == 0x82) *p++ = 0;
    uint8_t h[8]; h[0] = first; int n = 1 + put_len(h + 1, p - b);
    memcpy(tail(&c->out, n), h, n); memcpy(tail(&c->out, p - b), b, p - b);
}
static int churn(void) {
    churning = 1; cs = calloc(1, sizeof *cs); subqos = -1; connect_all(1, 0);
    uint64_t pairs = 0; double start = now(), end = start + seconds; acked = 0;
    while (now() < end) {
        uint64_t due = (uint64_t)((now() - start) * rate);
        for (; pairs < due; pairs++) { send_filter(cs, 0x82, 1 + pairs % 30000, pairs); send_filter(cs, 0xa2, 30001 + pairs % 30000, pairs); }
        flush(cs); poll_once(5);
        if (closed_by_peer) { fprintf(stderr, "mqttload: the broker closed the churning connection\n"); return 1; }
    }
    printf("churn pairs=%llu pairs_per_s=%.0f suback=%llu\n", (unsigned long long)pairs, pairs / (now() - start), (unsigned long long)acked);
    return acked * 10 < pairs * 9;
}
int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    if (argc < 2) { fprintf(stderr, "usage: mqttload flow|rate|idle|churn [options], see the source's head\n"); return 2; }
    const char *mode = argv[1];
    static struct option o[] = { {"host",1,0,'h'},{"port",1,0,'p'},{"pubs",1,0,'P'},{"subs",1,0,'S'},{"topics",1,0,'t'},{"qos",1,0,'q'},{"subqos",1,0,'Q'},{"size",1,0,'s'},{"v5",0,0,'5'},{"window",1,0,'w'},{"seconds",1,0,'d'},{"warm",1,0,'W'},{"rate",1,0,'r'},{"pid",1,0,'i'},{"conns",1,0,'c'},{"subscribe",0,0,'b'},{"sources",1,0,'n'},{"user",1,0,'u'},{"pass",1,0,'k'},{"prefix",1,0,'x'},{"shared",0,0,'g'},{"retain",0,0,'R'},{"all",0,0,'a'},{"ramp",1,0,'m'},{"groups",1,0,'G'},{"tls",0,0,'T'},{"persistent",0,0,'E'},{"offline",0,0,'O'},{"acks",0,0,'A'},{0} };
    int ch; optind = 2;
    while ((ch = getopt_long(argc, argv, "", o, NULL)) != -1) switch (ch) {
    case 'h': host = optarg; break; case 'p': port = atoi(optarg); break; case 'P': npub = atoi(optarg); break; case 'S': nsub = atoi(optarg); break;
    case 't': ntopics = atoi(optarg); break; case 'q': qos = atoi(optarg); break; case 'Q': subqos = atoi(optarg); break; case 's': size = atoi(optarg); break;
    case '5': version = 5; break; case 'w': window = atoi(optarg); break; case 'd': seconds = atof(optarg); break; case 'W': warm = atof(optarg); break;
    case 'r': rate = atof(optarg); break; case 'i': if (npids < 64) pids[npids++] = atoi(optarg); break; case 'c': conns = atoi(optarg); break; case 'b': subscribe_idle = 1; break;
    case 'n': nsrc = atoi(optarg); break; case 'u': user = optarg; break; case 'k': pass = optarg; break; case 'x': prefix = optarg; break; case 'g': shared_sub = 1; break;
    case 'R': retain = 1; break; case 'a': alltopics = 1; break; case 'm': ramp = atof(optarg); break; case 'G': groups = atoi(optarg); break;
    case 'E': persistent = 1; break; case 'O': persistent = offline = 1; break; case 'A': ack_times = 1; break;
#ifdef WITH_TLS
    case 'T': tls = SSL_CTX_new(TLS_client_method()); SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS); break;
#else
    case 'T': fprintf(stderr, "mqttload: built without TLS\n"); return 2;
#endif
    default: return 2; }
    if (size < 20) size = 20;
    struct rlimit rl = { 1048576, 1048576 }; if (setrlimit(RLIMIT_NOFILE, &rl)) { getrlimit(RLIMIT_NOFILE, &rl); rl.rlim_cur = rl.rlim_max; setrlimit(RLIMIT_NOFILE, &rl); }
    ep = epoll_create1(0);
    if (!strcmp(mode, "churn")) return churn();
    if (!strcmp(mode, "idle")) {
        subqos = subscribe_idle ? 0 : -1; ntopics = ntopics > 1 ? ntopics : conns; cs = calloc(conns, sizeof *cs);
        double r0 = broker_rss(), k0 = tcp_mem_mb(), c0 = broker_cpu(), t0 = now();
        connect_all(conns, conns); double t1 = now();
        for (int i = 0; i < conns; i++) { free(cs[i].in.p); free(cs[i].out.p); cs[i].in = cs[i].out = (Buf){0}; }
        double te = now() + seconds; while (now() < te) poll_once(100);
        printf("idle conns=%d connect_s=%.2f conn_per_s=%.0f broker_rss_mb=%.1f bytes_per_conn=%.0f cpu_us_per_conn=%.1f kernel_tcp_mb=%.1f closed=%llu\n", conns, t1 - t0, conns / (t1 - t0), broker_rss(), (broker_rss() - r0) * 1048576 / conns, (broker_cpu() - c0) * 1e6 / conns, tcp_mem_mb() - k0, (unsigned long long)closed_by_peer);
        return closed_by_peer != 0;
    }
    if (subqos < 0) subqos = qos;
    hist = calloc(HB, sizeof *hist); cs = calloc(npub + nsub, sizeof *cs); last_seq = calloc((uint64_t)(nsub ? nsub : 1) * npub, 8);
    int n = nsub + npub; connect_all(n, nsub); Conn *pubs = cs + nsub; acked = 0;
    if (offline) for (int i = 0; i < nsub; i++) { uint8_t bye[2] = { 0xe0, 0 }; memcpy(tail(&cs[i].out, 2), bye, 2); flush(&cs[i]); double until = now() + 0.01; while (now() < until) poll_once(1); epoll_ctl(ep, EPOLL_CTL_DEL, cs[i].fd, NULL); close(cs[i].fd); }
    closed_by_peer = 0;
    /* deliveries each message causes */
    double per = groups ? (double)nsub / groups : alltopics ? nsub : shared_sub ? 1 : (double)nsub / ntopics; if (nsub == 0 || offline) per = 0;
    int open_loop = !strcmp(mode, "rate");
    double start = now(), t_begin = start + warm, t_end = t_begin + seconds; int measuring = 0, stopped = 0;
    uint64_t s0 = 0, r0 = 0; double c0 = 0, m0 = 0, c1 = 0, m1 = 0; uint64_t s1 = 0, r1 = 0; int nextp = 0; uint64_t due = 0;
    for (;;) {
        double t = now();
        if (!measuring && t >= t_begin) { measuring = 1; s0 = sent; r0 = received; c0 = broker_cpu(); m0 = t; memset(hist, 0, HB * sizeof *hist); }
        if (!stopped && t >= t_end) { stopped = 1; s1 = sent; r1 = received; c1 = broker_cpu(); m1 = t; }
        if (stopped && ((per > 0 && received >= (uint64_t)(sent * per + 0.5) && (!qos || acked >= sent)) || (per == 0 && (!qos || acked >= sent)) || t > t_end + 5)) break;
        int idle_ms = 0;
        if (!stopped) {
            if (open_loop) { due = (uint64_t)((t - start) * rate); while (sent < due) { Conn *c = &pubs[nextp++ % npub]; if (qos && c->inflight >= c->most) break; send_publish(c); if (c->out.len > 32768) flush(c); } for (int i = 0; i < npub; i++) if (pubs[i].out.len && !pubs[i].want_write) flush(&pubs[i]); }
            else {
                uint64_t undelivered = per > 0 ? (uint64_t)(sent - received / per) : (qos ? sent - acked : 0); int budget = window - (int)undelivered, each = budget > 0 ? (budget + npub - 1) / npub : 0;
                for (int i = 0; i < npub && budget > 0; i++) { Conn *c = &pubs[(nextp + i) % npub]; if (c->want_write) continue; for (int k = 0; k < each && budget > 0; k++) { if (qos && c->inflight >= c->most) break; send_publish(c); budget--; } flush(c); }
                nextp++; idle_ms = 1;
            }
        } else idle_ms = 5;
        poll_once(open_loop ? 0 : idle_ms);
    }
    uint64_t want = (uint64_t)(sent * per + 0.5); lost = received < want ? want - received : 0;
    double w = m1 - m0, cpu = c1 - c0; uint64_t dr = r1 - r0, ds = s1 - s0;
    struct rusage ru; getrusage(RUSAGE_SELF, &ru);
    printf("%s qos=%d v=%d pubs=%d subs=%d topics=%d size=%d sent_per_s=%.0f delivered_per_s=%.0f acked=%llu", mode, qos, version, npub, nsub, ntopics, size, ds / w, dr / w, (unsigned long long)acked);
    if (npids) printf(" broker_cpu=%.2f delivered_per_cpu_s=%.0f handled_per_cpu_s=%.0f rss_mb=%.1f", cpu / w, cpu > 0 ? dr / cpu : 0, cpu > 0 ? (dr + ds) / cpu : 0, broker_rss());
    printf(" p50_us=%.0f p99_us=%.0f p999_us=%.0f max_us=%.0f lost=%llu reordered=%llu closed=%llu gen_cpu=%.2f\n", quantile(.5), quantile(.99), quantile(.999), quantile(1), (unsigned long long)lost, (unsigned long long)reordered, (unsigned long long)closed_by_peer, (ru.ru_utime.tv_sec + ru.ru_stime.tv_sec + (ru.ru_utime.tv_usec + ru.ru_stime.tv_usec) * 1e-6) / (now() - start));
    return lost || reordered || closed_by_peer ? 1 : 0;
}
