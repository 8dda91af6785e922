// The least that paging a file in order can cost in user space: what the kernel process asks of Linux for each page,
// and nothing else. Beside it Linux's own mmap. Each in a row, five rounds, median; nothing of the file cached before.
//
//     g++ -O2 -std=c++20 benchmarks/bare_paging.cpp -o /tmp/bare_paging && /tmp/bare_paging FILE
//
// - linux: a page is touched in a mapping of the file.
// - bare: 256 KiB are read into a buffer, written to a memfd, and so much is punched out of it as lies a quarter of the
//   file behind.
// - frames: the same without the reading: frames are made, filled, and given back.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <vector>

namespace {

constexpr size_t kPage = 4096, kPiece = 64 * kPage, kBuffer = 8 * kPage;

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + double(time.tv_nsec) * 1e-9;
}

void expect(bool right, const char* what) {
    if (right) return;
    perror(what);
    exit(1);
}

double linux_mapping(int file, size_t size) {
    auto* memory = static_cast<volatile char*>(mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0));
    expect(memory != MAP_FAILED, "mmap");
    const double start = now();
    for (size_t at = 0; at < size; at += kPage) (void)memory[at];
    const double took = now() - start;
    munmap(const_cast<char*>(memory), size);
    return took;
}

double frames(int file, size_t size, bool reads) {
    const int memfd = memfd_create("bare", MFD_CLOEXEC);
    expect(memfd >= 0 && ftruncate(memfd, off_t(size)) == 0, "a memfd");
    const auto buffer = std::make_unique<char[]>(kBuffer);
    const size_t behind = size / 4 / kPiece * kPiece;
    const double start = now();
    for (size_t piece = 0; piece < size; piece += kPiece) {
        for (size_t at = piece; at < std::min(piece + kPiece, size); at += kBuffer) {
            const size_t length = std::min(kBuffer, size - at);
            if (reads) expect(pread(file, buffer.get(), length, off_t(at)) == ssize_t(length), "read");
            expect(pwrite(memfd, buffer.get(), length, off_t(at)) == ssize_t(length), "write");
        }
        if (piece < behind) continue;
        const int how = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
        expect(fallocate(memfd, how, off_t(piece - behind), off_t(kPiece)) == 0, "punch");
    }
    const double took = now() - start;
    close(memfd);
    return took;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) {
        fprintf(stderr, "usage: bare_paging FILE\n");
        return 2;
    }
    const int file = open(arguments[1], O_RDONLY | O_CLOEXEC);
    expect(file >= 0, arguments[1]);
    const auto size = size_t(lseek(file, 0, SEEK_END)) / kPage * kPage;
    expect(size >= kPiece * 8, "a file of 2 MiB at least");
    std::vector<double> took[3];
    for (int round = 0; round < 5; ++round) {
        for (int what = 0; what < 3; ++what) {
            posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
            took[what].push_back(what == 0 ? linux_mapping(file, size) : frames(file, size, what == 1));
        }
    }
    const char* const names[] = {"linux", "bare", "frames"};
    for (int what = 0; what < 3; ++what) {
        std::sort(took[what].begin(), took[what].end());
        printf("%-6s %6.2f us a page\n", names[what], took[what][2] / double(size / kPage) * 1e6);
    }
}
