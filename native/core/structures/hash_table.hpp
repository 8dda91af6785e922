// A hash table of nodes that the caller owns: chained, intrusive, growing and shrinking one bucket at a time (linear
// hashing, Litwin 1980). No operation waits for a rehash, and a node never moves, whatever comes and goes around it.
//
// The table is policy-free: a look-up brings the hash and says which node it means; a node tells its hash again when
// its bucket is split. It has no lock: callers bring one, or are alone. Buckets lie in segments that double, so that
// growing copies nothing but pointers to segments; up to four nodes hang from the table itself, which then owns no
// memory at all.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <new>

#include "alloc/allocator.hpp"

namespace k42 {

// Spreads any hash, one to one: so that a mask chooses well, whatever numbers are hashed.
inline size_t spread(uint64_t hash) {
    hash *= 0x9E3779B97F4A7C15ull;
    return hash ^ hash >> 32;
}

// A node has a member `next`, which is the table's while the node is in it; `Hash{}(node)` is its hash, of which the
// low bits must be well mixed.
template <typename Node, typename Hash>
class HashTable {
  public:
    HashTable() = default;
    HashTable(const HashTable&) = delete;
    HashTable& operator=(const HashTable&) = delete;
    ~HashTable() { forget(); }

    size_t size() const { return size_; }
    // Of the buckets and their directory; the nodes are the caller's.
    size_t bytes() const {
        if (buckets_ == 1) return 0;
        const size_t last = segment_of(buckets_ - 1);
        return (capacity(last) + (last ? last + 1 : 0)) * sizeof(void*);
    }

    // The first node with this hash that `means(node)`; nodes of other hashes are among those it is asked about.
    template <typename Means>
    Node* find(size_t hash, Means&& means) const {
        for (Node* node = at(bucket_of(hash)); node; node = node->next) {
            if (means(*node)) return node;
        }
        return nullptr;
    }

    void insert(Node* node) noexcept {
        Node*& head = at(bucket_of(Hash{}(*node)));
        node->next = head;
        head = node;
        ++size_;
        if (size_ > buckets_) grow();
    }

    // Takes out a node that is in the table.
    void remove(Node* node) noexcept {
        Node** link = &at(bucket_of(Hash{}(*node)));
        while (*link != node) link = &(*link)->next;
        *link = node->next;
        --size_;
        shrink();
    }

    // All nodes, in no order; `visit` changes nothing in the table.
    template <typename Visit>
    void each(Visit&& visit) const {
        for (size_t i = 0; i < buckets_; ++i) {
            for (const Node* node = at(i); node; node = node->next) visit(*node);
        }
    }

    // Any node, or nullptr; from where `cursor` left off, so that taking out one after the other is no long search.
    Node* any(size_t& cursor) const {
        if (size_ == 0) return nullptr;
        for (;; ++cursor) {
            if (cursor >= buckets_) cursor = 0;
            if (Node* node = at(cursor)) return node;
        }
    }

    // Takes out the nodes of the next bucket after `cursor` that are `dead(node)`; returns them linked by next.
    template <typename Dead>
    Node* sweep(size_t& cursor, Dead&& dead) {
        if (cursor >= buckets_) cursor = 0;
        Node* taken = nullptr;
        const size_t before = size_;
        for (Node** link = &at(cursor++); *link;) {
            Node* node = *link;
            if (!dead(*node)) {
                link = &node->next;
                continue;
            }
            *link = node->next;
            node->next = taken;
            taken = node;
            --size_;
        }
        for (size_t i = before - size_; i > 0; --i) shrink();
        return taken;
    }

    // Takes out all nodes; returns them linked by next. The table is then as new.
    Node* take_all() noexcept {
        Node* taken = nullptr;
        for (size_t i = 0; i < buckets_; ++i) {
            while (Node* node = at(i)) {
                at(i) = node->next;
                node->next = taken;
                taken = node;
            }
        }
        forget();
        return taken;
    }

  private:
    static constexpr size_t few = 4;    // so many hang from `only_`, in one chain
    static constexpr size_t first = 8;  // buckets of segment 0: a line; the others are as large as all before them

    // There are between mask_/2 + 1 and mask_ + 1 buckets; those at the end that are missing are still part of their
    // twins, half the table before them.
    size_t bucket_of(size_t hash) const {
        const size_t bucket = hash & mask_;
        return bucket < buckets_ ? bucket : bucket & (mask_ >> 1);
    }
    static size_t segment_of(size_t bucket) { return static_cast<size_t>(std::bit_width(bucket / first)); }
    static size_t capacity(size_t segment) { return first << segment; }  // with those before it
    static size_t start(size_t segment) { return segment ? capacity(segment - 1) : 0; }
    Node*& at(size_t bucket) const {
        const size_t segment = segment_of(bucket);
        return segments_[segment][bucket - (capacity(segment) / 2 & ~(first - 1))];
    }

    // One bucket more. Without memory chains get longer, and the next insertion tries again.
    void grow() noexcept {
        if (buckets_ == 1) {
            if (size_ > few) spread();
            return;
        }
        const size_t fresh = buckets_;
        if (fresh == capacity(segment_of(fresh - 1)) && !add_segment()) return;
        if (fresh > mask_) mask_ = 2 * mask_ + 1;
        ++buckets_;
        Node** stays = &at(fresh & (mask_ >> 1));
        Node** goes = &at(fresh);
        for (Node* node = *stays; node; node = node->next) {
            Node**& link = (Hash{}(*node) & mask_) == fresh ? goes : stays;
            *link = node;
            link = &node->next;
        }
        *stays = *goes = nullptr;
    }

    // After a removal: two buckets less, at most, so that they are never more than twice the nodes for long. Sizes
    // between half of the buckets and all of them change nothing: no segment comes and goes all the time.
    void shrink() noexcept {
        for (int i = 0; i < 2 && buckets_ > first && size_ < buckets_ / 2; ++i) merge();
    }

    // The last bucket goes back into its twin.
    void merge() noexcept {
        const size_t last = buckets_ - 1;
        Node** end = &at(last & (mask_ >> 1));
        while (*end) end = &(*end)->next;
        *end = at(last);
        --buckets_;
        if (buckets_ <= (mask_ >> 1) + 1) mask_ >>= 1;
        if (const size_t segment = segment_of(last); last == start(segment)) alloc::deallocate(segments_[segment]);
    }

    // From one chain to the first segment.
    void spread() noexcept {
        auto** segment = pointers<Node*>(first);
        if (!segment) return;
        std::fill_n(segment, first, nullptr);
        Node* node = only_;
        only_ = nullptr;
        segment_ = segment;
        buckets_ = first;
        mask_ = first - 1;
        while (node) {
            Node*& head = at(bucket_of(Hash{}(*node)));
            Node* next = node->next;
            node->next = head;
            head = node;
            node = next;
        }
    }

    // The segment after those in use; its buckets are written when they are split off.
    bool add_segment() noexcept {
        const size_t segment = segment_of(buckets_);
        auto** added = pointers<Node*>(capacity(segment) - start(segment));
        auto*** directory = pointers<Node**>(segment + 1);
        if (!added || !directory) {
            alloc::deallocate(added);
            alloc::deallocate(directory);
            return false;
        }
        std::copy_n(segments_, segment, directory);
        directory[segment] = added;
        if (segments_ != &segment_) alloc::deallocate(segments_);
        segments_ = directory;
        return true;
    }

    // From the processor that uses the table: what is local to it shares no line with another's.
    template <typename Pointer>
    static Pointer* pointers(size_t count) noexcept {
        try {
            return static_cast<Pointer*>(alloc::allocate(count * sizeof(Pointer)));
        } catch (const std::bad_alloc&) {
            return nullptr;
        }
    }

    void forget() noexcept {
        if (buckets_ > 1) {
            for (size_t segment = 0; segment <= segment_of(buckets_ - 1); ++segment)
                alloc::deallocate(segments_[segment]);
        }
        if (segments_ != &segment_) alloc::deallocate(segments_);
        segments_ = &segment_;
        segment_ = &only_;
        only_ = nullptr;
        size_ = mask_ = 0;
        buckets_ = 1;
    }

    Node*** segments_ = &segment_;  // the directory
    Node** segment_ = &only_;       // a directory of one
    Node* only_ = nullptr;          // a segment of one bucket
    size_t buckets_ = 1;
    size_t mask_ = 0;
    size_t size_ = 0;
};

}  // namespace k42
