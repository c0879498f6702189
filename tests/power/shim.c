/* Stands between the unmodified broker and the C library (LD_PRELOAD) and writes down what happens to the files below one
 * folder: the log from which replay.py rebuilds that folder as a power cut would have left it. Linux, 64 bit.
 *
 * Environment:
 *   SHIM_ROOT    absolute path of the watched folder, without symbolic links; without it the shim does nothing
 *   SHIM_LOG     the log, appended to; several processes may share it. `<log>.shared` holds counter and lock
 *   SHIM_LIE     1: every sync is logged as one that the disk only pretended to do (replay settles nothing by it)
 *   SHIM_FAULTS  control file, read again whenever it has changed; replace it with rename
 *
 * Control file, one fault a line; `#` begins a comment:
 *   eio fdatasync 3           the third fdatasync from now on fails with EIO, once
 *   enospc write 2!           the second write and all after it fail with ENOSPC
 *   eio write 1 store/        only calls whose path below the folder contains `store/` match and count
 *   short write 1             half of the bytes are written and counted (none of a single one)
 *   late write 1              everything is written to the cache, then EIO: nobody knows what is on disk
 *   stall write 1! 30         it waits so many seconds first, or until the control file says otherwise, and then does it
 *   free 1048576              statvfs of anything below the folder reports so many bytes free
 * Errors: eio enospc erofs edquot emfile eacces. Calls: open (for writing), write (with pwrite, writev, sendfile, …), ftruncate
 * (with fallocate), rename, unlink (with rmdir), link, mkdir, fsync, fdatasync. Counting starts anew when the file
 * changes. An injected failure does nothing to the disk, and is itself an event of the log. A stall names its seconds where others
 * name a part of the path, which may follow; it is an event when it begins.
 *
 * Log: records of `struct record`, then path, second path and data. What needs no disk is one record, written after the
 * call and under a lock that orders all records. What syncs is two, so that a cut can fall in between: SYNC_WRITE or SYNC before the
 * call, DONE after it. Times are CLOCK_MONOTONIC and never fall. Stdio streams, symbolic links, sockets and sync(2) are not followed; a
 * shared writable mapping is logged so that the replay can refuse it. */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))

enum kind { OPEN = 1, WRITE, SYNC_WRITE, TRUNCATE, SYNC, DONE, RENAME, UNLINK, LINK, MKDIR, MAP, FAULT };
enum flag { CREATED = 1, EMPTIED = 2, FOLDER = 4, LIE = 8 };

struct record {
    uint32_t magic, length; /* of everything, this included */
    uint64_t sequence, time, inode, reference; /* reference: sequence of the record that a DONE ends */
    int64_t offset, result; /* result: bytes, 0, or -errno */
    uint8_t kind, flags;
    uint16_t path_length, target_length, mode;
    uint32_t data_length, process;
} __attribute__((packed));

#define MAGIC 0x31575049u /* IPW1 */
#define FDS 65536
#define FAULTS 16

struct shared {
    uint64_t sequence;
    int64_t version[3]; /* of the control file the counts belong to: inode, seconds, nanoseconds */
    uint64_t counts[FAULTS];
};

struct fault {
    char action[8], call[16], part[64];
    uint64_t number;
    int always, error;
    double seconds;
};

static char root[PATH_MAX];
static size_t root_length;
static const char *log_path, *faults_path;
static int lie, log_fd = -1, lock_fd = -1;
static struct shared *shared;
static pid_t owner;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char *watched[FDS]; /* path below the folder, per descriptor */
static struct fault faults[FAULTS];
static int fault_count;
static int64_t faults_version[3];
static uint64_t free_bytes = UINT64_MAX;

static void die(const char *what) {
    dprintf(2, "shim: %s: %s\n", what, strerror(errno));
    abort();
}

/* --- life ------------------------------------------------------------------------------------------------------ */

static int high(int fd) { /* out of the way of programs that count on low descriptors */
    int up = (int)syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 700);
    if (up < 0) return fd;
    syscall(SYS_close, fd);
    return up;
}

static void open_log(void) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s.shared", log_path);
    log_fd = high((int)syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    lock_fd = high((int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    if (log_fd < 0 || lock_fd < 0) die(log_path);
}

static void after_fork(void) { /* a lock of its own: flock belongs to the open file, which the child would share */
    owner = getpid();
    pthread_mutex_init(&mutex, NULL);
    if (root_length) open_log();
}

__attribute__((constructor)) static void start(void) {
    const char *folder = getenv("SHIM_ROOT");
    owner = getpid();
    log_path = getenv("SHIM_LOG");
    faults_path = getenv("SHIM_FAULTS");
    lie = getenv("SHIM_LIE") && !strcmp(getenv("SHIM_LIE"), "1");
    if (!folder || !log_path || folder[0] != '/' || strlen(folder) >= sizeof root) return;
    open_log();
    if (ftruncate(lock_fd, sizeof *shared)) die("the shared page");
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, lock_fd, 0);
    if (shared == MAP_FAILED) die("the shared page");
    pthread_atfork(NULL, NULL, after_fork);
    strcpy(root, folder);
    root_length = strlen(root);
}

static void enter(void) {
    pthread_mutex_lock(&mutex);
    while (flock(lock_fd, LOCK_EX) && errno == EINTR) {}
}

static void leave(void) {
    int saved = errno;
    flock(lock_fd, LOCK_UN);
    pthread_mutex_unlock(&mutex);
    errno = saved;
}

/* A child of vfork runs in our memory: what it closes before exec must not be forgotten here. */
static int ours(void) { return root_length && (pid_t)syscall(SYS_getpid) == owner; }

/* --- names ----------------------------------------------------------------------------------------------------- */

/* The path below the folder, "" for the folder itself; NULL when it lies elsewhere. `out` holds PATH_MAX. */
static const char *below(int dirfd, const char *path, char *out) {
    char whole[2 * PATH_MAX], base[PATH_MAX];
    size_t used = 0;
    if (!root_length || !path || !ours()) return NULL;
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else {
        if (dirfd == AT_FDCWD) {
            if (syscall(SYS_getcwd, base, sizeof base) < 0) return NULL;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
            ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
            if (n < 0) return NULL;
            base[n] = 0;
        }
        snprintf(whole, sizeof whole, "%s/%s", base, path);
    }
    for (char *rest = whole, *word; (word = strsep(&rest, "/"));) {
        if (!*word || !strcmp(word, ".")) continue;
        if (!strcmp(word, "..")) {
            while (used && out[--used] != '/') {}
        } else {
            size_t length = strlen(word);
            if (used + length + 2 > PATH_MAX) return NULL;
            out[used++] = '/';
            memcpy(out + used, word, length);
            used += length;
        }
    }
    out[used] = 0;
    if (strncmp(out, root, root_length) || (out[root_length] && out[root_length] != '/')) return NULL;
    return out[root_length] ? out + root_length + 1 : out + root_length;
}

static int is_watched(int fd) { return fd >= 0 && fd < FDS && watched[fd] != NULL; }

static void watch(int fd, const char *path) {
    if (fd < 0 || fd >= FDS || !ours()) return;
    char *old = watched[fd];
    watched[fd] = path ? strdup(path) : NULL;
    free(old);
}

static uint64_t inode_of(int fd) {
    struct stat st;
    return syscall(SYS_fstat, fd, &st) ? 0 : (uint64_t)st.st_ino;
}

/* --- the log --------------------------------------------------------------------------------------------------- */

static uint64_t note(struct record r, const char *path, const char *target, const struct iovec *data, int count, size_t limit) {
    struct iovec out[3 + 64];
    int parts = 3;
    size_t total = 0, expected;
    struct timespec now;
    for (int i = 0; i < count && total < limit; i++) {
        size_t piece = data[i].iov_len < limit - total ? data[i].iov_len : limit - total;
        if (parts == 67) die("more than 64 buffers in one call");
        out[parts++] = (struct iovec){data[i].iov_base, piece};
        total += piece;
    }
    clock_gettime(CLOCK_MONOTONIC, &now);
    r.magic = MAGIC;
    r.sequence = ++shared->sequence;
    r.time = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    r.process = (uint32_t)owner;
    r.path_length = path ? (uint16_t)strlen(path) : 0;
    r.target_length = target ? (uint16_t)strlen(target) : 0;
    r.data_length = (uint32_t)total;
    r.length = (uint32_t)(expected = sizeof r + r.path_length + r.target_length + total);
    out[0] = (struct iovec){&r, sizeof r};
    out[1] = (struct iovec){(void *)path, r.path_length};
    out[2] = (struct iovec){(void *)target, r.target_length};
    if (syscall(SYS_writev, log_fd, out, parts) != (long)expected) die("the log");
    return r.sequence;
}

static uint64_t note_file(enum kind kind, int fd, int64_t offset, int64_t result, uint64_t reference, int flags) {
    struct record r = {.kind = kind, .inode = inode_of(fd), .offset = offset, .result = result};
    r.reference = reference;
    r.flags = (uint8_t)(flags | (lie ? LIE : 0));
    return note(r, watched[fd], NULL, NULL, 0, 0);
}

/* --- faults on demand ------------------------------------------------------------------------------------------ */

static int number_of_error(const char *name) {
    static const struct { const char *name; int number; } known[] = {
        {"eio", EIO}, {"late", EIO}, {"enospc", ENOSPC}, {"erofs", EROFS}, {"edquot", EDQUOT}, {"emfile", EMFILE},
        {"eacces", EACCES}, {"short", 0}, {"stall", 0},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name)) return known[i].number;
    errno = EINVAL;
    die(name);
    return 0;
}

static void parse_faults(char *text) {
    fault_count = 0;
    free_bytes = UINT64_MAX;
    for (char *line; (line = strsep(&text, "\n"));) {
        struct fault f = {.action = ""};
        char number[24] = "";
        line[strcspn(line, "#")] = 0;
        int words = sscanf(line, "%7s %15s %23s %63s", f.action, f.call, number, f.part);
        if (words >= 3 && !strcmp(f.action, "stall")) {
            f.part[0] = 0;
            words = sscanf(line, "%*s %*s %*s %lf %63s", &f.seconds, f.part) + 3;
        }
        if (words == 2 && !strcmp(f.action, "free")) free_bytes = strtoull(f.call, NULL, 10);
        if (words < 3) continue;
        f.number = strtoull(number, NULL, 10);
        f.always = strchr(number, '!') != NULL;
        f.error = number_of_error(f.action);
        if (fault_count < FAULTS) faults[fault_count++] = f;
    }
}

/* Under the lock. */
static void read_faults(void) {
    struct stat st;
    int64_t version[3] = {0, 0, 0};
    if (!faults_path) return;
    if (!syscall(SYS_newfstatat, AT_FDCWD, faults_path, &st, 0)) {
        version[0] = (int64_t)st.st_ino;
        version[1] = st.st_mtim.tv_sec;
        version[2] = st.st_mtim.tv_nsec;
    }
    if (memcmp(version, shared->version, sizeof version)) {
        memcpy(shared->version, version, sizeof version);
        memset(shared->counts, 0, sizeof shared->counts);
    }
    if (!memcmp(version, faults_version, sizeof version)) return;
    memcpy(faults_version, version, sizeof version);
    char text[4096] = "";
    int fd = version[0] ? (int)syscall(SYS_openat, AT_FDCWD, faults_path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        ssize_t n = syscall(SYS_read, fd, text, sizeof text - 1);
        text[n > 0 ? n : 0] = 0;
        syscall(SYS_close, fd);
    }
    parse_faults(text);
}

/* Under the lock, which others get meanwhile: the disk does not answer. */
static void stall(const char *call, const char *path, double seconds) {
    struct record r = {.kind = FAULT};
    int64_t version[3];
    memcpy(version, faults_version, sizeof version);
    note(r, path, call, NULL, 0, 0);
    for (double waited = 0; waited < seconds && !memcmp(version, faults_version, sizeof version); waited += 0.01) {
        leave();
        nanosleep(&(struct timespec){0, 10000000}, NULL);
        enter();
        read_faults();
    }
}

/* Under the lock: the fault that this call meets, or NULL. */
static const struct fault *fault_for(const char *call, const char *path) {
    const struct fault *found = NULL;
    read_faults();
    for (int i = 0; i < fault_count; i++) {
        const struct fault *f = &faults[i];
        if (strcmp(f->call, call) || (f->part[0] && !strstr(path, f->part))) continue;
        uint64_t n = ++shared->counts[i];
        if (!found && (f->always ? n >= f->number : n == f->number)) found = f;
    }
    if (found && found->seconds > 0) {
        stall(call, path, found->seconds);
        return NULL;
    }
    if (found) {
        struct record r = {.kind = FAULT, .result = -found->error};
        note(r, path, call, NULL, 0, 0);
    }
    return found;
}

/* Under the lock: whether the call fails here, with errno set. For calls that can only fail, not half succeed. */
static int fails(const char *call, const char *path) {
    const struct fault *f = fault_for(call, path);
    if (f) errno = f->error ? f->error : EIO;
    return f != NULL;
}

/* --- open, close ----------------------------------------------------------------------------------------------- */

static int open_at(int dirfd, const char *path, int flags, mode_t mode) {
    char buffer[PATH_MAX];
    struct stat before;
    const char *name = below(dirfd, path, buffer);
    if (!name) {
        int fd = (int)syscall(SYS_openat, dirfd, path, flags, mode);
        if (root_length) watch(fd, NULL);
        return fd;
    }
    enter();
    if ((flags & (O_ACCMODE | O_CREAT)) && fails("open", name)) {
        leave();
        return -1;
    }
    int there = !syscall(SYS_newfstatat, dirfd, path, &before, 0);
    int fd = (int)syscall(SYS_openat, dirfd, path, flags, mode);
    watch(fd, name);
    if (is_watched(fd)) {
        struct stat st;
        syscall(SYS_fstat, fd, &st);
        struct record r = {.kind = OPEN, .inode = (uint64_t)st.st_ino, .mode = (uint16_t)(st.st_mode & 07777), .offset = flags};
        r.flags = (uint8_t)((there ? 0 : CREATED) | ((flags & O_TRUNC) ? EMPTIED : 0) | (S_ISDIR(st.st_mode) ? FOLDER : 0));
        if (S_ISREG(st.st_mode) || S_ISDIR(st.st_mode)) note(r, name, NULL, NULL, 0, 0);
        else watch(fd, NULL);
    }
    leave();
    return fd;
}

#define MODE(flags, last) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { \
        va_list list; \
        va_start(list, last); \
        mode = va_arg(list, mode_t); \
        va_end(list); \
    }

PUBLIC int open(const char *path, int flags, ...) { MODE(flags, flags) return open_at(AT_FDCWD, path, flags, mode); }
PUBLIC int open64(const char *path, int flags, ...) { MODE(flags, flags) return open_at(AT_FDCWD, path, flags, mode); }
PUBLIC int openat(int at, const char *path, int flags, ...) { MODE(flags, flags) return open_at(at, path, flags, mode); }
PUBLIC int openat64(int at, const char *path, int flags, ...) { MODE(flags, flags) return open_at(at, path, flags, mode); }
PUBLIC int __open_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
PUBLIC int __open64_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
PUBLIC int __openat_2(int at, const char *path, int flags) { return open_at(at, path, flags, 0); }
PUBLIC int __openat64_2(int at, const char *path, int flags) { return open_at(at, path, flags, 0); }
PUBLIC int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
PUBLIC int creat64(const char *path, mode_t mode) { return creat(path, mode); }

PUBLIC int close(int fd) {
    if (is_watched(fd) && ours()) watch(fd, NULL);
    return (int)syscall(SYS_close, fd);
}

static int copied(int from, int to) {
    if (root_length && to >= 0) watch(to, is_watched(from) ? watched[from] : NULL);
    return to;
}

PUBLIC int dup(int fd) { return copied(fd, (int)syscall(SYS_dup, fd)); }
PUBLIC int dup3(int fd, int to, int flags) { return copied(fd, (int)syscall(SYS_dup3, fd, to, flags)); }
PUBLIC int dup2(int fd, int to) {
    if (fd == to) return syscall(SYS_fcntl, fd, F_GETFD) < 0 ? -1 : to;
    return dup3(fd, to, 0);
}

static int control(int fd, int command, void *argument) {
    int result = (int)syscall(SYS_fcntl, fd, command, argument);
    return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? copied(fd, result) : result;
}

#define ARGUMENT \
    va_list list; \
    va_start(list, command); \
    void *argument = va_arg(list, void *); \
    va_end(list);

PUBLIC int fcntl(int fd, int command, ...) { ARGUMENT return control(fd, command, argument); }
PUBLIC int fcntl64(int fd, int command, ...) { ARGUMENT return control(fd, command, argument); }

/* --- write ----------------------------------------------------------------------------------------------------- */

static ssize_t raw_write(int fd, const struct iovec *data, int count, off_t offset, int flags) {
    if (offset < 0 && !flags) return syscall(SYS_writev, fd, data, count);
    return syscall(SYS_pwritev2, fd, data, count, (long)offset, 0L, flags);
}

static ssize_t write_at(int fd, const struct iovec *data, int count, off_t offset, int flags) {
    struct iovec half[64];
    struct stat st;
    size_t limit = 0;
    ssize_t n;
    int saved;
    enter();
    const struct fault *fault = fault_for("write", watched[fd]);
    int late = fault && !strcmp(fault->action, "late");
    for (int i = 0; i < count; i++) limit += data[i].iov_len;
    if (fault && fault->error && !late) {
        leave();
        errno = fault->error;
        return -1;
    }
    if (fault && !late && limit > 1) {
        size_t left = limit /= 2;
        int used = 0;
        for (; used < count && used < 64 && left; used++) {
            half[used] = (struct iovec){data[used].iov_base, data[used].iov_len < left ? data[used].iov_len : left};
            left -= half[used].iov_len;
        }
        data = half;
        count = used;
    }
    syscall(SYS_fstat, fd, &st);
    int status = (int)syscall(SYS_fcntl, fd, F_GETFL);
    int append = (status & O_APPEND) != 0;
    off_t place = append ? st.st_size : offset >= 0 ? offset : (off_t)syscall(SYS_lseek, fd, 0L, SEEK_CUR);
    int syncs = (status & O_DSYNC) || (flags & (RWF_DSYNC | RWF_SYNC)); /* O_SYNC holds O_DSYNC's bit */
    struct record r = {.kind = syncs ? SYNC_WRITE : WRITE, .inode = (uint64_t)st.st_ino, .offset = place};
    if (!syncs) {
        n = raw_write(fd, data, count, offset, flags);
        saved = errno;
        if (n > 0) {
            r.result = n;
            note(r, watched[fd], NULL, data, count, (size_t)n);
        }
    } else {
        r.flags = lie ? LIE : 0;
        uint64_t begun = note(r, watched[fd], NULL, data, count, limit);
        leave();
        n = raw_write(fd, data, count, offset, flags);
        saved = errno;
        enter();
        if (append && offset < 0 && n > 0) place = (off_t)syscall(SYS_lseek, fd, 0L, SEEK_CUR) - n;
        note_file(DONE, fd, place, late ? -EIO : n < 0 ? -saved : n, begun, late ? EMPTIED : 0);
    }
    leave();
    if (late && n >= 0) {
        n = -1;
        saved = EIO;
    }
    errno = saved;
    return n;
}

#define WATCHED(fd) (is_watched(fd) && ours())

PUBLIC ssize_t write(int fd, const void *data, size_t size) {
    if (!WATCHED(fd)) return syscall(SYS_write, fd, data, size);
    struct iovec one = {(void *)data, size};
    return write_at(fd, &one, 1, -1, 0);
}

PUBLIC ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    if (!WATCHED(fd)) return syscall(SYS_pwrite64, fd, data, size, offset);
    struct iovec one = {(void *)data, size};
    return write_at(fd, &one, 1, offset, 0);
}
PUBLIC ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }

PUBLIC ssize_t writev(int fd, const struct iovec *data, int count) {
    return WATCHED(fd) ? write_at(fd, data, count, -1, 0) : syscall(SYS_writev, fd, data, count);
}

PUBLIC ssize_t pwritev2(int fd, const struct iovec *data, int count, off_t offset, int flags) {
    return WATCHED(fd) ? write_at(fd, data, count, offset, flags)
                       : syscall(SYS_pwritev2, fd, data, count, (long)offset, 0L, flags);
}
PUBLIC ssize_t pwritev64v2(int fd, const struct iovec *d, int c, off64_t o, int f) { return pwritev2(fd, d, c, o, f); }
PUBLIC ssize_t pwritev(int fd, const struct iovec *d, int c, off_t o) { return pwritev2(fd, d, c, o, 0); }
PUBLIC ssize_t pwritev64(int fd, const struct iovec *d, int c, off64_t o) { return pwritev2(fd, d, c, o, 0); }

/* The kernel copies from file to file: done by hand, so that the data is seen. */
static ssize_t copy(int out, off_t *out_offset, int in, off_t *in_offset, size_t size) {
    char block[65536];
    size_t want = size < sizeof block ? size : sizeof block;
    ssize_t n = in_offset ? syscall(SYS_pread64, in, block, want, *in_offset) : syscall(SYS_read, in, block, want);
    if (n <= 0) return n;
    struct iovec one = {block, (size_t)n};
    ssize_t done = write_at(out, &one, 1, out_offset ? *out_offset : -1, 0);
    if (!in_offset && done < n) syscall(SYS_lseek, in, (long)((done < 0 ? 0 : done) - n), SEEK_CUR);
    if (in_offset && done > 0) *in_offset += done;
    if (out_offset && done > 0) *out_offset += done;
    return done;
}

PUBLIC ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    return WATCHED(out) ? copy(out, NULL, in, offset, size) : syscall(SYS_sendfile, out, in, offset, size);
}
PUBLIC ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) { return sendfile(out, in, offset, size); }

PUBLIC ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    return WATCHED(out) ? copy(out, to, in, from, size) : syscall(SYS_copy_file_range, in, from, out, to, size, flags);
}

PUBLIC void *mmap(void *where, size_t size, int protection, int flags, int fd, off_t offset) {
    void *result = (void *)syscall(SYS_mmap, where, size, protection, flags, fd, offset);
    if (result != MAP_FAILED && (protection & PROT_WRITE) && (flags & MAP_SHARED) && WATCHED(fd)) {
        enter();
        note_file(MAP, fd, offset, 0, 0, 0);
        leave();
    }
    return result;
}
PUBLIC void *mmap64(void *w, size_t s, int p, int f, int fd, off64_t o) { return mmap(w, s, p, f, fd, o); }

/* --- size and sync --------------------------------------------------------------------------------------------- */

static int resize(int fd, off_t offset, off_t length, int mode, int truncate) {
    struct stat st;
    int result = -1;
    enter();
    if (!fails("ftruncate", watched[fd])) {
        result = (int)(truncate ? syscall(SYS_ftruncate, fd, length) : syscall(SYS_fallocate, fd, mode, offset, length));
        int saved = errno;
        if (!result && !syscall(SYS_fstat, fd, &st)) note_file(TRUNCATE, fd, st.st_size, 0, 0, 0);
        errno = saved;
    }
    leave();
    return result;
}

PUBLIC int ftruncate(int fd, off_t size) { return WATCHED(fd) ? resize(fd, 0, size, 0, 1) : (int)syscall(SYS_ftruncate, fd, size); }
PUBLIC int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }
PUBLIC int truncate(const char *path, off_t size) {
    char buffer[PATH_MAX];
    if (!below(AT_FDCWD, path, buffer)) return (int)syscall(SYS_truncate, path, size);
    int fd = open_at(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0) return -1;
    int result = ftruncate(fd, size), saved = errno;
    close(fd);
    errno = saved;
    return result;
}
PUBLIC int truncate64(const char *path, off64_t size) { return truncate(path, size); }

PUBLIC int fallocate(int fd, int mode, off_t offset, off_t length) {
    if (!WATCHED(fd)) return (int)syscall(SYS_fallocate, fd, mode, offset, length);
    if (mode & ~FALLOC_FL_KEEP_SIZE) { /* punching and collapsing are not followed */
        errno = EOPNOTSUPP;
        return -1;
    }
    return resize(fd, offset, length, mode, 0);
}
PUBLIC int fallocate64(int fd, int mode, off64_t offset, off64_t length) { return fallocate(fd, mode, offset, length); }
PUBLIC int posix_fallocate(int fd, off_t offset, off_t length) { return fallocate(fd, 0, offset, length) ? errno : 0; }
PUBLIC int posix_fallocate64(int fd, off64_t offset, off64_t length) { return posix_fallocate(fd, offset, length); }

static int sync_file(int fd, const char *call, long number) {
    if (!WATCHED(fd)) return (int)syscall(number, fd);
    enter();
    int failed = fails(call, watched[fd]), result = -1, saved = errno;
    uint64_t begun = note_file(SYNC, fd, 0, 0, 0, 0);
    leave();
    if (!failed) {
        result = (int)syscall(number, fd);
        saved = errno;
    }
    enter();
    note_file(DONE, fd, 0, result ? -saved : 0, begun, 0);
    leave();
    errno = saved;
    return result;
}

PUBLIC int fsync(int fd) { return sync_file(fd, "fsync", SYS_fsync); }
PUBLIC int fdatasync(int fd) { return sync_file(fd, "fdatasync", SYS_fdatasync); }

static void shrink(struct statvfs *out) {
    uint64_t blocks;
    enter();
    read_faults();
    blocks = free_bytes == UINT64_MAX ? UINT64_MAX : free_bytes / (out->f_frsize ? out->f_frsize : 1);
    leave();
    if (blocks < out->f_bavail) out->f_bavail = blocks;
    if (blocks < out->f_bfree) out->f_bfree = blocks;
}

static int filled(const struct statfs *in, struct statvfs *out) {
    memset(out, 0, sizeof *out);
    out->f_bsize = (unsigned long)in->f_bsize;
    out->f_frsize = (unsigned long)(in->f_frsize ? in->f_frsize : in->f_bsize);
    out->f_blocks = in->f_blocks;
    out->f_bfree = in->f_bfree;
    out->f_bavail = in->f_bavail;
    out->f_files = in->f_files;
    out->f_ffree = out->f_favail = in->f_ffree;
    out->f_namemax = (unsigned long)in->f_namelen;
    out->f_flag = (unsigned long)in->f_flags & ~0x20ul; /* ST_VALID is the kernel's own */
    return 0;
}

PUBLIC int statvfs(const char *path, struct statvfs *out) {
    struct statfs raw;
    char buffer[PATH_MAX];
    if (syscall(SYS_statfs, path, &raw)) return -1;
    filled(&raw, out);
    if (below(AT_FDCWD, path, buffer)) shrink(out);
    return 0;
}
PUBLIC int statvfs64(const char *path, struct statvfs64 *out) { return statvfs(path, (struct statvfs *)out); }

PUBLIC int fstatvfs(int fd, struct statvfs *out) {
    struct statfs raw;
    if (syscall(SYS_fstatfs, fd, &raw)) return -1;
    filled(&raw, out);
    if (WATCHED(fd)) shrink(out);
    return 0;
}
PUBLIC int fstatvfs64(int fd, struct statvfs64 *out) { return fstatvfs(fd, (struct statvfs *)out); }

/* --- entries of folders ---------------------------------------------------------------------------------------- */

/* Under the lock, before the entry goes: what it names; 0 for sockets and the like, which do not survive a process. */
static uint64_t named(int at, const char *path) {
    struct stat st;
    if (syscall(SYS_newfstatat, at, path, &st, AT_SYMLINK_NOFOLLOW)) return 0;
    return S_ISREG(st.st_mode) || S_ISDIR(st.st_mode) ? (uint64_t)st.st_ino : 0;
}

static int two_names(enum kind kind, int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    char a[PATH_MAX], b[PATH_MAX];
    const char *old = below(from_at, from, a), *new = below(to_at, to, b), *call = kind == RENAME ? "rename" : "link";
    long number = kind == RENAME ? SYS_renameat2 : SYS_linkat;
    if (!old && !new) return (int)syscall(number, from_at, from, to_at, to, flags);
    if (!old || !new || (kind == RENAME && flags & RENAME_EXCHANGE)) { /* into or out of the folder: not followed */
        errno = EXDEV;
        return -1;
    }
    int result = -1;
    enter();
    if (!fails(call, new)) {
        struct record r = {.kind = kind, .inode = named(from_at, from)};
        result = (int)syscall(number, from_at, from, to_at, to, flags);
        int saved = errno;
        if (!result && r.inode) note(r, old, new, NULL, 0, 0);
        errno = saved;
    }
    leave();
    return result;
}

PUBLIC int renameat2(int fa, const char *f, int ta, const char *t, unsigned flags) { return two_names(RENAME, fa, f, ta, t, flags); }
PUBLIC int renameat(int fa, const char *f, int ta, const char *t) { return two_names(RENAME, fa, f, ta, t, 0); }
PUBLIC int rename(const char *f, const char *t) { return two_names(RENAME, AT_FDCWD, f, AT_FDCWD, t, 0); }
PUBLIC int linkat(int fa, const char *f, int ta, const char *t, int flags) { return two_names(LINK, fa, f, ta, t, (unsigned)flags); }
PUBLIC int link(const char *f, const char *t) { return two_names(LINK, AT_FDCWD, f, AT_FDCWD, t, 0); }

PUBLIC int unlinkat(int at, const char *path, int flags) {
    char buffer[PATH_MAX];
    const char *name = below(at, path, buffer);
    if (!name) return (int)syscall(SYS_unlinkat, at, path, flags);
    int result = -1;
    enter();
    if (!fails("unlink", name)) {
        struct record r = {.kind = UNLINK, .inode = named(at, path)};
        result = (int)syscall(SYS_unlinkat, at, path, flags);
        int saved = errno;
        if (!result && r.inode) note(r, name, NULL, NULL, 0, 0);
        errno = saved;
    }
    leave();
    return result;
}
PUBLIC int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
PUBLIC int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

PUBLIC int mkdirat(int at, const char *path, mode_t mode) {
    char buffer[PATH_MAX];
    const char *name = below(at, path, buffer);
    if (!name) return (int)syscall(SYS_mkdirat, at, path, mode);
    int result = -1;
    enter();
    if (!fails("mkdir", name)) {
        result = (int)syscall(SYS_mkdirat, at, path, mode);
        int saved = errno;
        struct record r = {.kind = MKDIR, .inode = named(at, path), .mode = (uint16_t)(mode & 07777)};
        if (!result) note(r, name, NULL, NULL, 0, 0);
        errno = saved;
    }
    leave();
    return result;
}
PUBLIC int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
