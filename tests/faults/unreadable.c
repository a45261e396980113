/* SPDX-License-Identifier: Apache-2.0 */
/* Loaded with LD_PRELOAD: reads of files whose path contains $UNREADABLE, from byte
 * $UNREADABLE_FROM on, fail with EIO, as on a disk with a broken sector. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int broken(int fd, off_t begin, size_t count)
{
    const char *part = getenv("UNREADABLE"), *from = getenv("UNREADABLE_FROM");
    char link[64], path[4096];
    if (!part || begin < 0 || begin + (off_t)count <= atoll(from ? from : "0"))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    if (!strstr(path, part))
        return 0;
    errno = EIO;
    return 1;
}

static size_t sum(const struct iovec *parts, int count)
{
    size_t nbytes = 0;
    for (int i = 0; i < count; i++)
        nbytes += parts[i].iov_len;
    return nbytes;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t read(int fd, void *buffer, size_t count)
{
    return broken(fd, lseek(fd, 0, SEEK_CUR), count) ? -1 : NEXT(read)(fd, buffer, count);
}

#define POSITIONED(name, offset_type) \
    ssize_t name(int fd, void *buffer, size_t count, offset_type offset) \
    { return broken(fd, offset, count) ? -1 : NEXT(name)(fd, buffer, count, offset); }
POSITIONED(pread, off_t)
POSITIONED(pread64, off64_t)

#define VECTORED(name, offset_type) \
    ssize_t name(int fd, const struct iovec *parts, int count, offset_type offset) \
    { return broken(fd, offset, sum(parts, count)) ? -1 : NEXT(name)(fd, parts, count, offset); }
VECTORED(preadv, off_t)
VECTORED(preadv64, off64_t)

#define FLAGGED(name, offset_type) \
    ssize_t name(int fd, const struct iovec *parts, int count, offset_type offset, int flags) \
    { return broken(fd, offset, sum(parts, count)) ? -1 \
             : NEXT(name)(fd, parts, count, offset, flags); }
FLAGGED(preadv2, off_t)
FLAGGED(preadv64v2, off64_t)
