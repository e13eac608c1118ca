/* The beginning of the one-file comfyd: unpack what follows it, once, and become what was unpacked.
 *
 * PyInstaller's own single file unpacks everything at every start (2.7 s to the open port, against 0.8 s), leaves it in
 * /tmp when it is killed, and stays as the parent of the process that does the work: a SIGKILL or a systemd that looks
 * at the main pid then meets the wrong one, and Ctrl-C arrives twice. So we unpack into a cache, under a name made of
 * the contents, and exec from there: one process, whose pid, signals and descriptors are those that it was given.
 *
 *   - A folder appears under its name only when it is complete (rename), so starts may race.
 *   - It is checked at each start (every file's size, well under a millisecond for them all); a power cut or a cleaner
 *     of temporary files that took some of it costs another unpacking, not the service.
 *   - Who runs from a folder holds a shared lock on it. systemd-tmpfiles leaves locked folders alone, and so do we when
 *     we remove other versions.
 *   - What we execute must be ours: a folder is used only if it belongs to this user or to root and nobody else may
 *     write into it.
 *
 * The layout after the launcher's own ELF image, written by pack.py, integers in the machine's order:
 *
 *   blocks   each: u32 packed bytes, u32 plain bytes, u32 Adler-32 of the plain bytes, an LZ4 block
 *            (their plain bytes, one after the other, are the contents of all files in the order of the index)
 *   index    each entry: u8 kind ('d', 'f', 'x' for an executable file, 'l' for a link), u64 bytes of content,
 *            u16 length of path, u16 length of target, path, target; neither ends in a NUL
 *   trailer  struct trailer
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC "comfyd\0\1"
#define ID_LENGTH 32          /* hexadecimal digits of the contents' SHA-256 */
#define MAX_BLOCK (1u << 20)  /* plain bytes; as in pack.py */
#define LOCK_DESCRIPTOR 100   /* or the next free one: far from those that systemd passes on, which begin at 3 */
#define ATTEMPTS 3            /* at one folder, when others who start or clean at the same moment come between */

struct trailer {
    uint64_t blocks_at, index_at, index_bytes, index_adler32;
    char id[ID_LENGTH];
    char magic[8];
};

struct entry {
    char kind;
    uint64_t bytes;
    char path[PATH_MAX], target[PATH_MAX];
};

static const uint8_t *file;  /* this program, mapped */
static struct trailer trailer;
static char why[4096]; /* the folders tried and what was wrong with them, a line each */

static void complain(const char *folder, const char *format, ...) {
    size_t used = strlen(why);
    int wrote = snprintf(why + used, sizeof why - used, "\n  %s: ", folder);
    if (wrote < 0 || used + (size_t)wrote >= sizeof why) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why + used + wrote, sizeof why - used - (size_t)wrote, format, arguments);
    va_end(arguments);
}

_Noreturn static void die(const char *format, ...) {
    va_list arguments;
    fputs("comfyd: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputs("\n", stderr);
    exit(1);
}

/* --- what is in the file --- */

static uint32_t adler32(const uint8_t *data, size_t bytes) {
    uint32_t a = 1, b = 0;
    while (bytes > 0) {
        size_t part = bytes < 5552 ? bytes : 5552; /* as many as fit before b overflows (RFC 1950) */
        for (size_t i = 0; i < part; i++) b += a += data[i];
        a %= 65521, b %= 65521;
        data += part;
        bytes -= part;
    }
    return b << 16 | a;
}

static void open_self(void) {
    int self = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (self < 0 || fstat(self, &status) < 0) die("cannot open my own file: %s", strerror(errno));
    uint64_t size = (uint64_t)status.st_size;
    file = mmap(NULL, size, PROT_READ, MAP_PRIVATE, self, 0);
    if (file == MAP_FAILED) die("cannot map my own file: %s", strerror(errno));
    close(self);
    memcpy(&trailer, file + size - sizeof trailer, sizeof trailer); /* an ELF image is larger than a trailer */
    if (memcmp(trailer.magic, MAGIC, sizeof trailer.magic) != 0 || trailer.index_at > size - sizeof trailer ||
        trailer.index_bytes != size - sizeof trailer - trailer.index_at || trailer.blocks_at > trailer.index_at ||
        adler32(file + trailer.index_at, trailer.index_bytes) != trailer.index_adler32)
        die("this file is damaged; download or build it again");
}

static int read_name(const uint8_t **at, size_t length, char *name) {
    if (length >= PATH_MAX) return 0;
    memcpy(name, *at, length);
    name[length] = 0;
    *at += length;
    return 1;
}

/* Read the entry at *at* and move past it; 0 at the end. */
static int next_entry(const uint8_t **at, struct entry *entry) {
    const uint8_t *end = file + trailer.index_at + trailer.index_bytes;
    uint16_t path, target;
    if (end - *at < 13) return 0;
    entry->kind = (char)(*at)[0];
    memcpy(&entry->bytes, *at + 1, 8);
    memcpy(&path, *at + 9, 2);
    memcpy(&target, *at + 11, 2);
    *at += 13;
    if (end - *at < path + target || !read_name(at, path, entry->path) || !read_name(at, target, entry->target))
        die("this file was packed wrongly: its index ends in the middle of an entry");
    return 1;
}

/* An LZ4 block (lz4_Block_format.md), checked against both ends; the plain size, or -1. */
static ssize_t unpack_block(const uint8_t *in, size_t packed, uint8_t *out, size_t room) {
    const uint8_t *in_end = in + packed;
    size_t done = 0;
    while (in < in_end) {
        unsigned token = *in++;
        size_t literals = token >> 4, match = (token & 15) + 4;
        if (literals == 15) {
            unsigned more;
            do {
                if (in == in_end) return -1;
                literals += more = *in++;
            } while (more == 255);
        }
        if (literals > (size_t)(in_end - in) || literals > room - done) return -1;
        memcpy(out + done, in, literals);
        in += literals;
        done += literals;
        if (in == in_end) return (ssize_t)done; /* the last sequence has no match */
        if (in_end - in < 2) return -1;
        size_t offset = in[0] | (size_t)in[1] << 8;
        in += 2;
        if ((token & 15) == 15) {
            unsigned more;
            do {
                if (in == in_end) return -1;
                match += more = *in++;
            } while (more == 255);
        }
        if (offset == 0 || offset > done || match > room - done) return -1;
        if (offset >= match)
            memcpy(out + done, out + done - offset, match);
        else
            for (size_t i = 0; i < match; i++) out[done + i] = out[done + i - offset]; /* it overlaps itself */
        done += match;
    }
    return -1;
}

/* The plain bytes of all files, from block to block. */
static uint8_t plain[MAX_BLOCK];
static size_t plain_at, plain_end;
static const uint8_t *block;

/* Unpack the next block; 0 if it is damaged, with EBADMSG. */
static int next_block(void) {
    uint32_t head[3];
    const uint8_t *end = file + trailer.index_at;
    int sound = (size_t)(end - block) >= sizeof head;
    if (sound) {
        memcpy(head, block, sizeof head);
        block += sizeof head;
        sound = head[0] <= (size_t)(end - block) && head[1] > 0 && head[1] <= MAX_BLOCK &&
                unpack_block(block, head[0], plain, MAX_BLOCK) == (ssize_t)head[1] && adler32(plain, head[1]) == head[2];
    }
    if (!sound) {
        errno = EBADMSG;
        return 0;
    }
    block += head[0];
    plain_at = 0;
    plain_end = head[1];
    return 1;
}

/* --- unpacking --- */

static void remove_tree(int parent, const char *name) {
    int folder = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *listing = folder < 0 ? NULL : fdopendir(folder);
    if (listing != NULL) {
        for (struct dirent *each; (each = readdir(listing)) != NULL;) {
            if (strcmp(each->d_name, ".") == 0 || strcmp(each->d_name, "..") == 0) continue;
            if (unlinkat(folder, each->d_name, 0) < 0 && errno == EISDIR) remove_tree(folder, each->d_name);
        }
        closedir(listing);
    } else if (folder >= 0) {
        close(folder);
    }
    unlinkat(parent, name, AT_REMOVEDIR);
}

static int write_file(int folder, const struct entry *entry) {
    int out = openat(folder, entry->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, entry->kind == 'x' ? 0755 : 0644);
    if (out < 0) return 0;
    for (uint64_t left = entry->bytes; left > 0;) {
        if (plain_at == plain_end && !next_block()) {
            close(out);
            errno = EBADMSG;
            return 0;
        }
        size_t part = plain_end - plain_at < left ? plain_end - plain_at : (size_t)left;
        ssize_t wrote = write(out, plain + plain_at, part);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote < 0) {
            int reason = errno;
            close(out);
            errno = reason;
            return 0;
        }
        plain_at += (size_t)wrote;
        left -= (size_t)wrote;
    }
    return close(out) == 0;
}

static int write_entries(int folder) {
    struct entry entry;
    const uint8_t *at = file + trailer.index_at;
    block = file + trailer.blocks_at;
    plain_at = plain_end = 0;
    while (next_entry(&at, &entry)) {
        int done = entry.kind == 'd'   ? mkdirat(folder, entry.path, 0755) == 0
                   : entry.kind == 'l' ? symlinkat(entry.target, folder, entry.path) == 0
                                       : write_file(folder, &entry);
        if (!done) return 0;
    }
    return 1;
}

/* Whether every entry is in the folder, as long as it ought to be. */
static int is_whole(int folder) {
    struct entry entry;
    struct stat status;
    const uint8_t *at = file + trailer.index_at;
    while (next_entry(&at, &entry)) {
        mode_t type = entry.kind == 'd' ? S_IFDIR : entry.kind == 'l' ? S_IFLNK : S_IFREG;
        if (fstatat(folder, entry.path, &status, AT_SYMLINK_NOFOLLOW) < 0 || (status.st_mode & S_IFMT) != type ||
            (type == S_IFREG && (uint64_t)status.st_size != entry.bytes))
            return 0;
    }
    return 1;
}

static void name_beside(char *name) {
    uint64_t number = 0;
    if (getrandom(&number, sizeof number, 0) < 0) number = (uint64_t)getpid(); /* no pid: containers may share a cache */
    snprintf(name, NAME_MAX, "%.*s.%016llx", ID_LENGTH, trailer.id, (unsigned long long)number);
}

/* Open the folder *name* and lock it against removal. Some network file systems have no locks: then without. */
static int open_locked(int parent, const char *name) {
    int folder = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (folder >= 0) flock(folder, LOCK_SH);
    return folder;
}

/* Remove other versions and what was begun and not ended, unless somebody is at work in it. */
static void remove_others(int cache) {
    int copy = openat(cache, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *listing = copy < 0 ? NULL : fdopendir(copy);
    if (listing == NULL) return;
    for (struct dirent *each; (each = readdir(listing)) != NULL;) {
        const char *name = each->d_name;
        size_t digits = strspn(name, "0123456789abcdef");
        if (digits != ID_LENGTH || (name[digits] != 0 && name[digits] != '.')) continue; /* not of our making */
        if (strncmp(name, trailer.id, ID_LENGTH) == 0 && name[digits] == 0) continue;
        int folder = openat(cache, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (folder < 0) continue;
        if (flock(folder, LOCK_EX | LOCK_NB) == 0) remove_tree(cache, name);
        close(folder);
    }
    closedir(listing);
}

/* Unpack beside and put it in place; 0 if it cannot be, with errno. */
static int unpack(int cache) {
    char beside[NAME_MAX], id[ID_LENGTH + 1] = {0};
    memcpy(id, trailer.id, ID_LENGTH);
    name_beside(beside);
    if (mkdirat(cache, beside, 0755) < 0) return 0;
    int folder = open_locked(cache, beside);
    int done = folder >= 0 && write_entries(folder) &&
               (renameat(cache, beside, cache, id) == 0 || errno == EEXIST || errno == ENOTEMPTY);
    int reason = errno;
    remove_tree(cache, beside); /* nothing there if all went well; ours if another was quicker */
    if (folder >= 0) close(folder);
    if (done) remove_others(cache);
    errno = reason;
    return done;
}

/* --- where to --- */

/* Make the folder and its parents, and open it if what it holds may be trusted; else -1, with a complaint. */
static int open_cache(const char *path) {
    char part[PATH_MAX];
    snprintf(part, sizeof part, "%s", path);
    for (char *slash = part + 1; (slash = strchr(slash, '/')) != NULL; *slash++ = '/') {
        *slash = 0;
        mkdir(part, 0755); /* what it cannot make, the open below reports */
    }
    mkdir(part, 0755);
    int cache = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    struct stat status;
    if (cache < 0 || fstat(cache, &status) < 0) {
        complain(path, "%s", strerror(errno));
    } else if ((status.st_uid != geteuid() && status.st_uid != 0) || (status.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
        complain(path, "others may write there");
        close(cache);
        cache = -1;
    }
    return cache;
}

/* Become the program in this cache, unpacked before or now. Returns if that cannot be, with a complaint. */
static void run_from(const char *path, char **arguments) {
    char program[PATH_MAX], beside[NAME_MAX], id[ID_LENGTH + 1] = {0};
    memcpy(id, trailer.id, ID_LENGTH);
    if (path[0] != '/' || snprintf(program, sizeof program, "%s/%s/comfyd", path, id) >= (int)sizeof program) {
        complain(path, "not an absolute path, or too long a one");
        return;
    }
    int cache = open_cache(path);
    if (cache < 0) return;
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        int folder = open_locked(cache, id);
        if (folder >= 0 && is_whole(folder)) {
            if (access(program, X_OK) == 0) {
                fcntl(folder, F_DUPFD, LOCK_DESCRIPTOR); /* not closed by exec: the lock lasts as long as the process */
                execv(program, arguments);
            }
            complain(path, "%s%s", strerror(errno), errno == EACCES ? " (is it mounted noexec?)" : "");
            close(folder);
            break;
        }
        if (folder >= 0) {
            close(folder);
            name_beside(beside);
            if (renameat(cache, id, cache, beside) == 0) remove_tree(cache, beside);
        }
        if (!unpack(cache) && (errno != ENOENT || attempt == ATTEMPTS - 1)) { /* ENOENT: somebody cleaned up */
            if (errno == EBADMSG) die("this file is damaged; download or build it again");
            complain(path, "%s", strerror(errno));
            break;
        }
    }
    close(cache);
}

static void run_below(const char *parent, const char *format, char **arguments) {
    char path[PATH_MAX];
    if (parent == NULL || parent[0] != '/') return; /* a relative one is to be ignored, says the XDG specification */
    if (snprintf(path, sizeof path, format, parent, (unsigned)geteuid()) < (int)sizeof path) run_from(path, arguments);
}

int main(int count, char **arguments) {
    (void)count;
    open_self();
    const char *chosen = getenv("COMFYD_UNPACK_DIR");
    if (chosen != NULL && chosen[0] != 0) {
        run_from(chosen, arguments); /* only there: who names a folder does not want another one */
    } else {
        const char *temporary = getenv("TMPDIR");
        run_below(getenv("CACHE_DIRECTORY"), "%s", arguments); /* systemd's CacheDirectory= */
        run_below(getenv("XDG_CACHE_HOME"), "%s/comfyd", arguments);
        run_below(getenv("HOME"), "%s/.cache/comfyd", arguments);
        run_below("/var/cache", "%s/comfyd", arguments);
        run_below(temporary, "%s/comfyd-%u", arguments);
        run_below("/tmp", "%s/comfyd-%u", arguments);
        run_below("/dev/shm", "%s/comfyd-%u", arguments);
    }
    die("there is no folder to unpack into:%s\nName one that I may write to in COMFYD_UNPACK_DIR.", why);
}
