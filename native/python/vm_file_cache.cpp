// k42._native.FileCache: the pages of one file, the native half of an FCM; and HintQueue, through which it says where
// read-ahead is due.
#include "vm.hpp"

namespace k42::edge {

namespace {

using Self = Holder<FileCacheValue>;

vm::FileCache& cache_of(PyObject* self) { return Self::of(self).cache; }

bool to_run(uint64_t first, uint32_t count) {
    if (count > 0 && count <= vm::FileCache::kMaxGroup && first + count > first) return true;
    PyErr_SetString(PyExc_ValueError, "a run is 1 to 512 pages");
    return false;
}

bool to_range(uint64_t page, uint64_t first, uint32_t count) {
    if (count == 0 || count > vm::FileCache::kMaxGroup || page < first || page >= first + count) {
        PyErr_SetString(PyExc_ValueError, "a page range outside the file, or too long");
        return false;
    }
    return true;
}

bool to_fault(PyObject* hat, int cpu, uint64_t address, bool write, bool tracked, vm::FaultAt& out) {
    HatValue* value = checked<HatValue>(hat, vm_types.hat);
    if (!value) return false;
    if (cpu < 0 || cpu >= value->hat->cpus() || address % vm::kPageSize) {
        PyErr_SetString(PyExc_ValueError, "no such CPU, or an address that is not a page's");
        return false;
    }
    out = {value->hat, cpu, address, write, false, tracked};
    return true;
}

PyObject* run_of(const vm::FileCache::Run& run) { return Py_BuildValue("(KI)", run.first, run.count); }

PyObject* list_of(const std::vector<vm::FileCache::Run>& runs) {
    Ref list = Ref::steal(PyList_New(Py_ssize_t(runs.size())));
    if (!list) return nullptr;
    for (size_t i = 0; i < runs.size(); ++i) {
        PyObject* run = run_of(runs[i]);
        if (!run) return nullptr;
        PyList_SET_ITEM(list.get(), Py_ssize_t(i), run);
    }
    return list.release();
}

PyObject* list_of_pages(const std::vector<uint64_t>& pages) {
    Ref list = Ref::steal(PyList_New(Py_ssize_t(pages.size())));
    if (!list) return nullptr;
    for (size_t i = 0; i < pages.size(); ++i) {
        PyObject* number = PyLong_FromUnsignedLongLong(pages[i]);
        if (!number) return nullptr;
        PyList_SET_ITEM(list.get(), Py_ssize_t(i), number);
    }
    return list.release();
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    PyObject* pool;
    int memfd, journal, cpus;
    uint64_t pages;
    uint32_t fill, backing, policy, tables;
    if (!unpack_new("FileCache", args, kwargs, pool, memfd, journal, pages, fill, backing, policy, cpus, tables)) {
        return nullptr;
    }
    FramePoolValue* frames = checked<FramePoolValue>(pool, vm_types.frame_pool);
    if (!frames) return nullptr;
    if (fill > uint32_t(vm::Fill::source) || backing > uint32_t(vm::Backing::overcommitted) ||
        policy > uint32_t(vm::Policy::s3fifo) || tables > uint32_t(vm::Tables::partitioned) || pages == 0 || cpus < 1 ||
        cpus > 65536) {
        PyErr_SetString(PyExc_ValueError, "no such fill, backing, policy or table, no pages, or no CPUs");
        return nullptr;
    }
    return Self::make(type, Ref::borrow(pool), &frames->pool, memfd, journal, pages, vm::Fill(fill),
                      vm::Backing(backing), vm::Policy(policy), cpus, vm::Tables(tables));
}

PyObject* resolve(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* hat;
    int cpu;
    bool write, tracked;
    uint64_t address, page, first;
    uint32_t count;
    vm::FaultAt fault;
    if (!unpack("resolve", args, nargs, hat, cpu, address, write, tracked, page, first, count) ||
        !to_range(page, first, count) || !to_fault(hat, cpu, address, write, tracked, fault)) {
        return nullptr;
    }
    vm::Outcome outcome;
    {
        Detached detached;
        outcome = cache_of(self).resolve(fault, page, {first, count}, {first, count});
    }
    return PyLong_FromLong(long(outcome));
}

PyObject* begin_io(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t page, first;
    uint32_t count;
    if (!unpack("begin_io", args, nargs, page, first, count) || !to_range(page, first, count)) {
        return nullptr;
    }
    vm::FileCache::Run run;
    {
        Detached detached;
        run = cache_of(self).begin_io(page, {first, count});
    }
    return run_of(run);
}

PyObject* complete_io(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* hat;
    int cpu;
    bool write, tracked;
    uint64_t address, page, first, begin, end;
    uint32_t count;
    uint16_t owner;
    vm::FaultAt fault;
    if (!unpack("complete_io", args, nargs, hat, cpu, address, write, tracked, page, first, count, begin, end, owner) ||
        !to_run(first, count) || !to_fault(hat, cpu, address, write, tracked, fault)) {
        return nullptr;
    }
    if (page < begin || page >= end || page < first || page >= first + count) {
        PyErr_SetString(PyExc_ValueError, "the faulting page is not among those that the region shows");
        return nullptr;
    }
    vm::Outcome outcome;
    {
        Detached detached;
        outcome = cache_of(self).complete_io(&fault, page, {first, count}, begin, end, false, owner);
    }
    return PyLong_FromLong(long(outcome));
}

PyObject* begin_fill(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first;
    uint32_t count;
    if (!unpack("begin_fill", args, nargs, first, count) || !to_run(first, count)) return nullptr;
    vm::FileCache::Run run;
    {
        Detached detached;
        run = cache_of(self).begin_fill({first, count});
    }
    return run_of(run);
}

PyObject* complete_prefetch(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first;
    uint32_t count;
    bool own;
    uint16_t owner;
    if (!unpack("complete_prefetch", args, nargs, first, count, own, owner) || !to_run(first, count)) return nullptr;
    {
        Detached detached;
        cache_of(self).complete_io(nullptr, first, {first, count}, 0, 0, own, owner);
    }
    Py_RETURN_NONE;
}

PyObject* abort_io(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first, frames;
    uint32_t count;
    uint16_t owner;
    if (!unpack("abort_io", args, nargs, first, count, frames, owner) || !to_run(first, count)) return nullptr;
    {
        Detached detached;
        cache_of(self).abort_io({first, count}, frames, owner);
    }
    Py_RETURN_NONE;
}

PyObject* reclaim(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t count;
    bool thorough;
    uint32_t whose;
    if (!unpack("reclaim", args, nargs, count, thorough, whose)) return nullptr;
    vm::FileCache::Reclaimed result;
    {
        Detached detached;
        result = cache_of(self).reclaim(count, thorough, whose);
    }
    return Py_BuildValue("(KK)", result.given, result.dirty);
}

PyObject* begin_write(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first;
    uint32_t count;
    if (!unpack("begin_write", args, nargs, first, count) || !to_run(first, count)) return nullptr;
    vm::FileCache::Writing writing;
    {
        Detached detached;
        writing = cache_of(self).begin_write({first, count});
    }
    return Py_BuildValue("(KII)", writing.run.first, writing.run.count, writing.busy);
}

PyObject* take_laundry(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint32_t most;
    if (!unpack("take_laundry", args, nargs, most) || !to_run(0, most)) return nullptr;
    vm::FileCache::Run run;
    {
        Detached detached;
        run = cache_of(self).take_laundry(most);
    }
    return run_of(run);
}

PyObject* end_write(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first;
    uint32_t count;
    bool written, evict;
    if (!unpack("end_write", args, nargs, first, count, written, evict) || !to_run(first, count)) return nullptr;
    uint64_t given;
    {
        Detached detached;
        given = cache_of(self).end_write({first, count}, written, evict);
    }
    return PyLong_FromUnsignedLongLong(given);
}

PyObject* dirty_runs(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first, end;
    if (!unpack("dirty_runs", args, nargs, first, end)) return nullptr;
    std::vector<vm::FileCache::Run> runs;
    {
        Detached detached;
        runs = cache_of(self).dirty_runs(first, end);
    }
    return list_of(runs);
}

PyObject* present(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first, end;
    if (!unpack("present", args, nargs, first, end)) return nullptr;
    uint64_t count;
    {
        Detached detached;
        count = cache_of(self).present(first, end);
    }
    return PyLong_FromUnsignedLongLong(count);
}

PyObject* endings(PyObject* self, PyObject*) { return PyLong_FromUnsignedLongLong(cache_of(self).endings()); }

PyObject* wait_ending(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t seen;
    uint32_t timeout;
    if (!unpack("wait_ending", args, nargs, seen, timeout)) return nullptr;
    bool ended;
    {
        Detached detached;
        ended = cache_of(self).wait_ending(seen, std::chrono::milliseconds(timeout));
    }
    return PyBool_FromLong(ended);
}

PyObject* discard(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first, end;
    bool dirty;
    if (!unpack("discard", args, nargs, first, end, dirty)) return nullptr;
    uint64_t busy;
    {
        Detached detached;
        busy = cache_of(self).discard(first, end, dirty);
    }
    return PyLong_FromUnsignedLongLong(busy);
}

PyObject* resize(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t pages;
    if (!unpack("resize", args, nargs, pages)) return nullptr;
    if (!cache_of(self).resize(pages)) {
        PyErr_SetString(PyExc_ValueError, "a cached file has at least one page, and grows by 256 GiB at most");
        return nullptr;
    }
    Py_RETURN_NONE;
}

PyObject* share(PyObject* self, PyObject*) {
    bool safe;
    {
        Detached detached;
        safe = cache_of(self).share();
    }
    return PyBool_FromLong(safe);
}

PyObject* unshare(PyObject* self, PyObject*) {
    cache_of(self).unshare();
    Py_RETURN_NONE;
}

PyObject* generation(PyObject* self, PyObject*) { return PyLong_FromUnsignedLongLong(cache_of(self).generation()); }

PyObject* allow(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t page, generation;
    if (!unpack("allow", args, nargs, page, generation)) return nullptr;
    {
        Detached detached;
        cache_of(self).allow(page, generation);
    }
    Py_RETURN_NONE;
}

PyObject* own(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t page;
    if (!unpack("own", args, nargs, page)) return nullptr;
    vm::FileCache::Owned owned;
    {
        Detached detached;
        owned = cache_of(self).own(page);
    }
    return PyLong_FromLong(long(owned));
}

PyObject* owned(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    bool all;
    if (!unpack("owned", args, nargs, all)) return nullptr;
    std::vector<uint64_t> pages;
    {
        Detached detached;
        pages = cache_of(self).owned(all);
    }
    return list_of_pages(pages);
}

PyObject* stored(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t page;
    if (!unpack("stored", args, nargs, page)) return nullptr;
    if (page >= cache_of(self).pages()) Py_RETURN_FALSE;
    return PyBool_FromLong(cache_of(self).stored(page));
}

PyObject* pin(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first;
    uint32_t count;
    if (!unpack("pin", args, nargs, first, count) || !to_run(first, count)) return nullptr;
    bool pinned;
    {
        Detached detached;
        pinned = cache_of(self).pin({first, count});
    }
    return PyBool_FromLong(pinned);
}

PyObject* unpin(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first;
    uint32_t count;
    if (!unpack("unpin", args, nargs, first, count) || !to_run(first, count)) return nullptr;
    {
        Detached detached;
        cache_of(self).unpin({first, count});
    }
    Py_RETURN_NONE;
}

PyObject* pinned(PyObject* self, PyObject*) {
    const auto pins = cache_of(self).pinned();
    Ref list = Ref::steal(PyList_New(Py_ssize_t(pins.size())));
    for (size_t i = 0; list && i < pins.size(); ++i) {
        PyObject* pair = Py_BuildValue("(KI)", static_cast<unsigned long long>(pins[i].first), pins[i].second);
        if (!pair) return nullptr;
        PyList_SET_ITEM(list.get(), Py_ssize_t(i), pair);
    }
    return list.release();
}

PyObject* set_pins(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t page;
    uint32_t count;
    if (!unpack("set_pins", args, nargs, page, count) || !to_run(page, 1)) return nullptr;
    {
        Detached detached;
        cache_of(self).set_pins(page, count);
    }
    Py_RETURN_NONE;
}

PyObject* set_marker(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* hints;
    uint64_t id, page;
    if (!unpack("set_marker", args, nargs, hints, id, page)) return nullptr;
    HintQueueValue* value = checked<HintQueueValue>(hints, vm_types.hint_queue);
    if (!value) return nullptr;
    FileCacheValue& cache = Self::of(self);
    cache.keep(Ref::borrow(hints));
    cache.cache.set_marker(&value->queue, id, page);
    Py_RETURN_NONE;
}

PyObject* read_from(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* read_ahead;
    PyObject* hints;
    int descriptor;
    uint64_t size, id;
    uint32_t cluster;
    if (!unpack("read_from", args, nargs, descriptor, size, cluster, read_ahead, hints, id)) return nullptr;
    FileCacheValue& value = Self::of(self);
    if (descriptor < 0 || cluster < 1 || cluster > vm::Source::kMostPages || value.cache.source()) {
        PyErr_SetString(PyExc_ValueError, "no descriptor, a cluster of too many pages, or it has a source already");
        return nullptr;
    }
    vm::ReadAhead* const policy = checked<vm::ReadAhead>(read_ahead, vm_types.read_ahead);
    if (!policy) return nullptr;
    vm::Prefetcher* prefetcher = nullptr;
    if (hints != Py_None) {
        HintQueueValue* checked_hints = checked<HintQueueValue>(hints, vm_types.hint_queue);
        if (!checked_hints) return nullptr;
        value.keep(Ref::borrow(hints));
        prefetcher = &checked_hints->prefetcher;
    }
    if (vm::Source::may_hang(descriptor)) Py_RETURN_NONE;
    value.read_ahead = Ref::borrow(read_ahead);
    value.cache.read_from(std::make_unique<vm::Source>(descriptor, size, cluster, *policy, prefetcher, id));
    Py_RETURN_NONE;
}

PyObject* read_in(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first, end;
    uint16_t owner;
    if (!unpack("read_in", args, nargs, first, end, owner)) return nullptr;
    vm::FileCache& cache = cache_of(self);
    if (cache.source()) {
        Detached detached;
        first = vm::read_in(cache, first, end, {owner}).reached;
    }
    return PyLong_FromUnsignedLongLong(first);
}

// Runs with the cache's source; does nothing where there is none.
template <typename Call>
PyObject* with_source(PyObject* self, Call&& call) {
    if (vm::Source* source = cache_of(self).source()) call(*source);
    Py_RETURN_NONE;
}

PyObject* source_size(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t size;
    if (!unpack("source_size", args, nargs, size)) return nullptr;
    return with_source(self, [&](vm::Source& source) { source.resize(size); });
}

PyObject* writing_source(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    bool begins;
    if (!unpack("writing_source", args, nargs, begins)) return nullptr;
    return with_source(self, [&](vm::Source& source) { begins ? source.begin_write() : source.end_write(); });
}

PyObject* drain_source(PyObject* self, PyObject*) {
    return with_source(self, [&](vm::Source& source) {
        Detached detached;
        source.drain();
    });
}

PyObject* restore(PyObject* self, PyObject*) {
    uint64_t restored;
    {
        Detached detached;
        restored = cache_of(self).restore();
    }
    return PyLong_FromUnsignedLongLong(restored);
}

PyObject* replicate(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    bool replicated, done;
    if (!unpack("replicate", args, nargs, replicated)) return nullptr;
    {
        Detached detached;
        done = cache_of(self).replicate(replicated);
    }
    return PyBool_FromLong(done);
}
PyObject* tables(PyObject* self, PyObject*) { return PyLong_FromLong(long(cache_of(self).tables())); }
PyObject* copies(PyObject* self, PyObject*) { return PyLong_FromSize_t(cache_of(self).copies()); }

PyObject* attach(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* region;
    if (!unpack("attach", args, nargs, region)) return nullptr;
    RegionValue* value = checked<RegionValue>(region, vm_types.region);
    if (!value) return nullptr;
    cache_of(self).attach(&value->region);
    Py_RETURN_NONE;
}

PyObject* detach(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* region;
    if (!unpack("detach", args, nargs, region)) return nullptr;
    RegionValue* value = checked<RegionValue>(region, vm_types.region);
    if (!value) return nullptr;
    Detached detached;
    cache_of(self).detach(&value->region);
    return Py_NewRef(Py_None);
}

PyObject* counts(PyObject* self, PyObject*) {
    const vm::FileCache::Counts c = cache_of(self).counts();
    return Py_BuildValue("{sKsKsKsKsKsKsKsKsKsKsKsK}", "mapped", c.mapped, "zero_filled", c.zero_filled, "filled",
                         c.filled, "queued", c.queued, "evicted", c.evicted, "dirtied", c.dirtied, "written", c.written,
                         "probed", c.probed, "rescued", c.rescued, "read_ahead", c.read_ahead, "resident", c.resident,
                         "dirty", c.dirty);
}

PyObject* memfd(PyObject* self, PyObject*) { return PyLong_FromLong(cache_of(self).memfd()); }
PyObject* journal(PyObject* self, PyObject*) { return PyLong_FromLong(cache_of(self).journal()); }
PyObject* pages(PyObject* self, PyObject*) { return PyLong_FromUnsignedLongLong(cache_of(self).pages()); }

PyObject* resident(PyObject* self, PyObject*) {
    std::vector<uint64_t> pages;
    {
        Detached detached;
        pages = cache_of(self).table().resident();
    }
    return list_of_pages(pages);
}

PyObject* sizes(PyObject* self, PyObject*) {
    const vm::FileCache& cache = cache_of(self);
    return Py_BuildValue("(nn)", Py_ssize_t(cache.table().size()), Py_ssize_t(cache.bytes()));
}

PyMethodDef methods[] = {
    {"resolve", fast(resolve), METH_FASTCALL,
     "resolve(hat, cpu, address, write, tracked, page, first, count): finish a fault with what is at hand; the "
     "Outcome."},
    {"begin_io", fast(begin_io), METH_FASTCALL,
     "begin_io(page, first, count): mark the absent run around page as in I/O; its (first, count), or (page, 0)."},
    {"complete_io", fast(complete_io), METH_FASTCALL,
     "complete_io(hat, cpu, address, write, tracked, page, first, count, begin, end, owner): the run is filled: "
     "resident, waiters woken, and what of it lies in pages [begin, end) mapped. owner: the account of its frames."},
    {"begin_fill", fast(begin_fill), METH_FASTCALL,
     "begin_fill(first, count): the same with the first absent run in the range; (first, 0): there is none."},
    {"complete_prefetch", fast(complete_prefetch), METH_FASTCALL,
     "complete_prefetch(first, count, own, owner): the run is filled, and no fault waits to be mapped; own: it is "
     "dirty."},
    {"share", share, METH_NOARGS, "An heir reads here from now on: no write passes without allow(); False: try again."},
    {"unshare", unshare, METH_NOARGS, "No heir any more."},
    {"generation", generation, METH_NOARGS, "Counts the calls of share()."},
    {"allow", fast(allow), METH_FASTCALL,
     "allow(page, generation): the heir has the page; nothing where share() was called since."},
    {"own", fast(own), METH_FASTCALL,
     "own(page): of a snapshot: the page comes from the source no more; 0: it is not here, 1: so it is, 2: in I/O."},
    {"owned", fast(owned), METH_FASTCALL,
     "owned(all): the pages that are here alone, dirty or in swap space; all: and what else is resident."},
    {"stored", fast(stored), METH_FASTCALL, "stored(page): whether swap space has it."},
    {"abort_io", fast(abort_io), METH_FASTCALL,
     "abort_io(first, count, frames, owner): the run is absent again, the frames that were taken for it given back, "
     "waiters woken."},
    {"reclaim", fast(reclaim), METH_FASTCALL,
     "reclaim(count, thorough, whose): evict up to so many clean pages by the policy; (frames given, dirty pages put "
     "in line). whose: an account's number, 0: of those above their shares, 65536: anybody's."},
    {"begin_write", fast(begin_write), METH_FASTCALL,
     "begin_write(first, count): the next dirty run of the range is protected, and the caller's to write: (first, "
     "count, busy pages before it)."},
    {"take_laundry", fast(take_laundry), METH_FASTCALL,
     "take_laundry(most): the same with pages that stand in line: (first, count)."},
    {"end_write", fast(end_write), METH_FASTCALL,
     "end_write(first, count, written, evict): the write-back has ended; frames given back."},
    {"dirty_runs", fast(dirty_runs), METH_FASTCALL, "dirty_runs(first, end): the dirty pages, as (first, count)."},
    {"present", fast(present), METH_FASTCALL, "present(first, end): how many pages are there, or on their way."},
    {"endings", endings, METH_NOARGS, "Fills and write-backs ended so far, for wait_ending()."},
    {"wait_ending", fast(wait_ending), METH_FASTCALL,
     "wait_ending(seen, timeout): wait until endings() differs, or a timeout in ms; False then."},
    {"discard", fast(discard), METH_FASTCALL,
     "discard(first, end, dirty): take the pages away, dirty ones too or not; how many are in I/O and stay."},
    {"resize", fast(resize), METH_FASTCALL, "resize(pages): faults behind the end fail from now on."},
    {"pin", fast(pin), METH_FASTCALL, "pin(first, count): keep these frames; False unless all are resident."},
    {"unpin", fast(unpin), METH_FASTCALL, "unpin(first, count): end one pin of each."},
    {"pinned", pinned, METH_NOARGS, "(page, pins) of each that is pinned; after a take-over, as the journal says."},
    {"set_pins", fast(set_pins), METH_FASTCALL, "set_pins(page, count): so often a resident page is pinned."},
    {"set_marker", fast(set_marker), METH_FASTCALL,
     "set_marker(hints, id, page): the fault that maps this page gives a hint, once."},
    {"read_from", fast(read_from), METH_FASTCALL,
     "read_from(descriptor, size, cluster, read_ahead, hints, id): absent pages are read by native threads, `cluster` "
     "at once; and ahead by those of the HintQueue, if not None, which tells Python of the rest under the id."},
    {"read_in", fast(read_in), METH_FASTCALL,
     "read_in(first, end, owner): bring in absent pages natively, on an account; where that ended: the rest, if any, "
     "is the FR's."},
    {"source_size", fast(source_size), METH_FASTCALL,
     "source_size(size): the file has so many bytes; 0: we change its length, and native threads read nothing."},
    {"writing_source", fast(writing_source), METH_FASTCALL,
     "writing_source(begins): a write to the file begins, or ends: by us, not by others."},
    {"drain_source", drain_source, METH_NOARGS,
     "Wait until no native thread reads; no region shows the file any more."},
    {"restore", restore, METH_NOARGS, "Make resident what the journal says is valid; how many pages."},
    {"replicate", fast(replicate), METH_FASTCALL,
     "replicate(replicated): copies of page descriptors for each processor, or none; False: it is partitioned."},
    {"tables", tables, METH_NOARGS, "What the page table is: 0 shared, 1 replicated, 2 partitioned."},
    {"copies", copies, METH_NOARGS, "Copies of page descriptors that processors have."},
    {"attach", fast(attach), METH_FASTCALL, "A region shows this file."},
    {"detach", fast(detach), METH_FASTCALL, "A region shows it no more."},
    {"counts", counts, METH_NOARGS, "Faults and pages so far, by what became of them."},
    {"memfd", memfd, METH_NOARGS, "The descriptor of the frames; stays this object's."},
    {"journal", journal, METH_NOARGS, "The descriptor of the journal; stays this object's."},
    {"pages", pages, METH_NOARGS, "How many pages the file has."},
    {"resident", resident, METH_NOARGS, "The resident pages' indices, sorted."},
    {"sizes", sizes, METH_NOARGS, "(descriptors, bytes they take)."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(Self::dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_doc, const_cast<char*>("FileCache(pool, memfd, journal, pages, fill, backing, policy, cpus, tables, /)\n\n"
                                  "The pages of one file, their frames in a memfd, which it takes over, as the "
                                  "journal (paper 4.4).")},
    {0, nullptr},
};

PyType_Spec spec = {"k42._native.FileCache", sizeof(Self), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};

using SelfHints = Holder<HintQueueValue>;

PyObject* make_hints(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    if (!unpack_new("HintQueue", args, kwargs)) return nullptr;
    return SelfHints::make(type);
}

PyObject* next_hint(PyObject* self, PyObject*) {
    std::optional<vm::Hint> hint;
    {
        Detached detached;
        hint = SelfHints::of(self).queue.next();
    }
    if (!hint) Py_RETURN_NONE;
    return Py_BuildValue("(KKKI)", hint->id, hint->page, hint->client, hint->count);
}

PyObject* close_hints(PyObject* self, PyObject*) {
    SelfHints::of(self).queue.close();
    Detached detached;
    SelfHints::of(self).prefetcher.stop();
    Py_RETURN_NONE;
}

PyMethodDef hint_methods[] = {
    {"next", next_hint, METH_NOARGS,
     "Wait for a hint: (id, page, client, 0), of a page that bears a marker, or with how many pages from there on are "
     "to "
     "be brought in; None once it is closed."},
    {"close", close_hints, METH_NOARGS, "Let next() return None from now on, and end the threads that read ahead."},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot hint_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make_hints)},
    {Py_tp_dealloc, reinterpret_cast<void*>(SelfHints::dealloc)},
    {Py_tp_methods, hint_methods},
    {Py_tp_doc, const_cast<char*>("HintQueue()\n\nWhere faults say that read-ahead is due.")},
    {0, nullptr},
};
PyType_Spec hint_spec = {"k42._native.HintQueue", sizeof(SelfHints), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                         hint_slots};

using SelfReadAhead = Holder<vm::ReadAhead>;
using Pattern = vm::ReadAhead::Pattern;

PyObject* make_read_ahead(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    uint64_t pages, limit, least;
    if (!unpack_new("ReadAhead", args, kwargs, pages, limit, least)) return nullptr;
    return SelfReadAhead::make(type, pages, limit, least);
}

PyObject* ahead_or_none(const std::optional<vm::ReadAhead::Ahead>& ahead) {
    if (!ahead) Py_RETURN_NONE;
    return Py_BuildValue("(KKK)", ahead->first, ahead->count, ahead->marker);
}

PyObject* missed(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first, count;
    if (!unpack("missed", args, nargs, first, count)) return nullptr;
    return ahead_or_none(SelfReadAhead::of(self).missed(first, count));
}

PyObject* touched(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t page;
    if (!unpack("touched", args, nargs, page)) return nullptr;
    return ahead_or_none(SelfReadAhead::of(self).touched(page));
}

PyObject* advise(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint32_t pattern;
    if (!unpack("advise", args, nargs, pattern)) return nullptr;
    if (pattern > uint32_t(Pattern::random)) {
        PyErr_SetString(PyExc_ValueError, "no such pattern");
        return nullptr;
    }
    SelfReadAhead::of(self).advise(Pattern(pattern));
    Py_RETURN_NONE;
}

PyObject* pattern(PyObject* self, PyObject*) { return PyLong_FromLong(long(SelfReadAhead::of(self).pattern())); }

PyObject* resize_read_ahead(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t pages;
    if (!unpack("resize", args, nargs, pages)) return nullptr;
    SelfReadAhead::of(self).resize(pages);
    Py_RETURN_NONE;
}

PyMethodDef read_ahead_methods[] = {
    {"missed", fast(missed), METH_FASTCALL,
     "missed(first, count): a fault brings absent pages in; (first, pages, marker) to read ahead, or None."},
    {"touched", fast(touched), METH_FASTCALL,
     "touched(page): a page with a marker was touched; (first, pages, marker) to read next, or None."},
    {"advise", fast(advise), METH_FASTCALL, "advise(pattern): it will be read so: 0 normal, 1 sequential, 2 random."},
    {"pattern", pattern, METH_NOARGS, "What was advised last."},
    {"resize", fast(resize_read_ahead), METH_FASTCALL, "resize(pages): the file has so many pages now."},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot read_ahead_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make_read_ahead)},
    {Py_tp_dealloc, reinterpret_cast<void*>(SelfReadAhead::dealloc)},
    {Py_tp_methods, read_ahead_methods},
    {Py_tp_doc, const_cast<char*>("ReadAhead(pages, limit, least, /)\n\nThe policy of read-ahead of one file.")},
    {0, nullptr},
};
PyType_Spec read_ahead_spec = {"k42._native.ReadAhead", sizeof(SelfReadAhead), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, read_ahead_slots};

}  // namespace

int add_file_cache(PyObject* module) {
    vm_types.file_cache = add_type(module, &spec);
    vm_types.hint_queue = add_type(module, &hint_spec);
    vm_types.read_ahead = add_type(module, &read_ahead_spec);
    return vm_types.file_cache && vm_types.hint_queue && vm_types.read_ahead ? 0 : -1;
}

}  // namespace k42::edge
