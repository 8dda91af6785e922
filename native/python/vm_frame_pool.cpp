// k42._native.FramePool and Account: the frames of the Global Page Manager, and what each client has of them.
#include <cerrno>

#include "vm_variants.hpp"

namespace k42::edge {

namespace {

using Self = Holder<FramePoolValue>;

vm::FramePool& pool_of(PyObject* self) { return Self::of(self).pool; }

bool to_backing(uint32_t number, vm::Backing& out) {
    if (number > uint32_t(vm::Backing::overcommitted)) {
        PyErr_SetString(PyExc_ValueError, "no such backing");
        return false;
    }
    out = vm::Backing(number);
    return true;
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    uint64_t budget;
    bool distributed;
    if (!unpack_new("FramePool", args, kwargs, budget, distributed)) return nullptr;
    if (budget > vm::Account::kNoLimit) {
        PyErr_SetString(PyExc_ValueError, "so many frames there are not");
        return nullptr;
    }
    return Self::make(type, budget, distributed);
}

PyObject* reserve(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    if (!unpack("reserve", args, nargs, frames)) return nullptr;
    return PyBool_FromLong(pool_of(self).reserve(frames));
}

PyObject* unreserve(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    if (!unpack("unreserve", args, nargs, frames)) return nullptr;
    if (frames > pool_of(self).usage().promised_anonymous) {
        PyErr_SetString(PyExc_ValueError, "more frames than were reserved");
        return nullptr;
    }
    pool_of(self).unreserve(frames);
    Py_RETURN_NONE;
}

PyObject* promise_file(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    if (!unpack("promise_file", args, nargs, frames)) return nullptr;
    return PyBool_FromLong(pool_of(self).promise_file(frames));
}

PyObject* allocate(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    uint32_t number;
    uint16_t owner;
    vm::Backing backing;
    if (!unpack("allocate", args, nargs, frames, number, owner) || !to_backing(number, backing)) return nullptr;
    vm::FramePool::Grant grant;
    {
        Detached detached;  // a census may be under way
        grant = pool_of(self).allocate(frames, backing, owner);
    }
    return PyLong_FromLong(long(grant));
}

PyObject* release(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    uint32_t number;
    uint16_t owner;
    vm::Backing backing;
    if (!unpack("release", args, nargs, frames, number, owner) || !to_backing(number, backing)) return nullptr;
    {
        Detached detached;
        pool_of(self).release(frames, backing, owner);
    }
    Py_RETURN_NONE;
}

PyObject* changes(PyObject* self, PyObject*) { return PyLong_FromUnsignedLongLong(pool_of(self).changes()); }

PyObject* wait(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t seen;
    uint32_t timeout;
    if (!unpack("wait", args, nargs, seen, timeout)) return nullptr;
    bool changed;
    {
        Detached detached;
        changed = pool_of(self).wait(seen, std::chrono::milliseconds(timeout));
    }
    return PyBool_FromLong(changed);
}

PyObject* dict_of(const vm::FramePool::Usage& u) {
    return Py_BuildValue("{sKsKsKsKsKsK}", "budget", u.budget, "file", u.file, "reserved", u.reserved, "overcommitted",
                         u.overcommitted, "promised_anonymous", u.promised_anonymous, "promised_file", u.promised_file);
}

PyObject* usage(PyObject* self, PyObject*) { return dict_of(pool_of(self).usage()); }

PyObject* free_frames(PyObject* self, PyObject*) { return PyLong_FromUnsignedLongLong(pool_of(self).free()); }
PyObject* enough(PyObject* self, PyObject*) { return PyLong_FromUnsignedLongLong(pool_of(self).enough()); }

PyObject* level(PyObject* self, PyObject*) { return PyLong_FromLong(long(pool_of(self).level())); }
PyObject* check(PyObject* self, PyObject*) {
    return PyBool_FromLong(pool_of(self).check() && pool_of(self).accounts().check());
}

PyObject* low_event(PyObject* self, PyObject*) {
    const int event = pool_of(self).low_event();
    return event < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(event);
}

PyObject* distribute(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    return change("distribute", args, nargs, [&](bool is) { pool_of(self).distribute(is); });
}
PyObject* distributed(PyObject* self, PyObject*) { return PyBool_FromLong(pool_of(self).distributed()); }
PyObject* uses_by(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    const runtime::Processor* processor = processor_of("uses_by", args, nargs);
    return processor ? PyLong_FromUnsignedLongLong(pool_of(self).uses_by(*processor)) : nullptr;
}
PyObject* traffic(PyObject* self, PyObject*) { return to_python(pool_of(self).traffic()); }

PyObject* above_share(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint16_t number;
    if (!unpack("above_share", args, nargs, number)) return nullptr;
    return PyBool_FromLong(pool_of(self).accounts().above_share(number));
}

PyObject* refresh_shares(PyObject* self, PyObject*) { return PyBool_FromLong(pool_of(self).accounts().refresh()); }

PyObject* census(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* list;
    if (!unpack("census", args, nargs, list)) return nullptr;
    const Ref caches = Ref::steal(PySequence_Tuple(list));
    if (!caches) return nullptr;
    std::vector<const vm::FileCache*> natives;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(caches.get()); ++i) {
        FileCacheValue* value = checked<FileCacheValue>(PyTuple_GET_ITEM(caches.get(), i), vm_types.file_cache);
        if (!value) return nullptr;
        natives.push_back(&value->cache);
    }
    vm::FileCache::Tally tally;
    vm::FramePool::Census census;
    {
        Detached detached;
        census = pool_of(self).census([&] {
            for (const vm::FileCache* cache : natives) cache->tally(tally);
        });
    }
    Ref accounts = Ref::steal(PyDict_New());
    if (!accounts) return nullptr;
    for (const auto& [number, charged] : census.charged) {
        const Ref key = Ref::steal(PyLong_FromLong(number));
        const Ref value = Ref::steal(Py_BuildValue("(LK)", (long long)charged, tally.resident[number]));
        if (!key || !value || PyDict_SetItem(accounts.get(), key.get(), value.get()) < 0) return nullptr;
        tally.resident.erase(number);
    }
    uint64_t orphans = 0;
    for (const auto& [number, pages] : tally.resident) orphans += pages;
    return Py_BuildValue("(NNKK)", dict_of(census.usage), accounts.release(), orphans, tally.moving);
}

// Account

using SelfAccount = Holder<AccountValue>;

// nullptr with an exception when it is closed. Within a request of the runtime: others may close it.
vm::Account* account_of(PyObject* self) {
    vm::Account* account = SelfAccount::of(self).account.load();
    if (!account) PyErr_SetString(PyExc_ValueError, "the account is closed");
    return account;
}

PyObject* make_account(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    PyObject *pool, *limit;
    if (!unpack_new("Account", args, kwargs, pool, limit)) return nullptr;
    FramePoolValue* value = checked<FramePoolValue>(pool, vm_types.frame_pool);
    if (!value) return nullptr;
    std::optional<uint64_t> frames;
    if (limit != Py_None) {
        uint64_t number;
        if (!convert(limit, number)) return nullptr;
        if (number > vm::Account::kNoLimit) {
            PyErr_SetString(PyExc_ValueError, "so many frames there are not");
            return nullptr;
        }
        frames = number;
    }
    vm::Accounts& accounts = value->pool.accounts();
    vm::Account* account = accounts.open(frames, value->pool.distributed());
    if (!account) {
        PyErr_SetString(PyExc_OverflowError, "65,535 clients have, or had, pages in the kernel");
        return nullptr;
    }
    return SelfAccount::make(type, Ref::borrow(pool), accounts, *account);
}

PyObject* charge(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    const runtime::Within within;
    vm::Account* account = account_of(self);
    if (!account || !unpack("charge", args, nargs, frames)) return nullptr;
    return PyBool_FromLong(frames <= vm::Account::kNoLimit && account->charge(frames));
}

PyObject* uncharge(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    const runtime::Within within;
    vm::Account* account = account_of(self);
    if (!account || !unpack("uncharge", args, nargs, frames)) return nullptr;
    if (frames > vm::Account::kNoLimit) {
        PyErr_SetString(PyExc_ValueError, "more frames than were charged");
        return nullptr;
    }
    account->uncharge(frames);
    Py_RETURN_NONE;
}

PyObject* number(PyObject* self, PyObject*) {
    const runtime::Within within;
    vm::Account* account = account_of(self);
    return account ? PyLong_FromLong(account->id()) : nullptr;
}
PyObject* used(PyObject* self, PyObject*) {
    const runtime::Within within;
    const vm::Account* account = SelfAccount::of(self).account.load();
    return PyLong_FromUnsignedLongLong(account ? account->used() : 0);
}
PyObject* limit(PyObject* self, PyObject*) {
    const uint64_t frames = SelfAccount::of(self).limit;
    if (frames == vm::Account::kNoLimit) Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(frames);
}
PyObject* share(PyObject* self, PyObject*) {
    const runtime::Within within;
    vm::Account* account = account_of(self);
    return account ? PyLong_FromUnsignedLongLong(SelfAccount::of(self).accounts.share(*account)) : nullptr;
}

PyObject* close_account(PyObject* self, PyObject*) {
    SelfAccount::of(self).close();
    Py_RETURN_NONE;
}

PyMethodDef account_methods[] = {
    {"charge", fast(charge), METH_FASTCALL,
     "charge(frames): count them as the client's; False when its limit is less."},
    {"uncharge", fast(uncharge), METH_FASTCALL, "uncharge(frames): they are its no more."},
    {"number", number, METH_NOARGS, "What descriptors of pages call the account: 1 to 65535."},
    {"used", used, METH_NOARGS, "Frames charged, exact while nobody charges; 0 once it is closed."},
    {"limit", limit, METH_NOARGS, "How many it may have, or None."},
    {"share", share, METH_NOARGS, "How many are its share of the budget at this moment."},
    {"close", close_account, METH_NOARGS, "Nothing is charged any more; the number is free once all is given back."},
    {nullptr, nullptr, 0, nullptr},
};

PyMethodDef methods[] = {
    {"reserve", fast(reserve), METH_FASTCALL, "Promise frames to anonymous memory; False when they cannot be had."},
    {"unreserve", fast(unreserve), METH_FASTCALL, "Take a promise to anonymous memory back."},
    {"promise_file", fast(promise_file), METH_FASTCALL, "Keep room for a file page of so many frames."},
    {"allocate", fast(allocate), METH_FASTCALL,
     "allocate(frames, backing, owner): take frames, charged to the account of this number: 0 granted, 1 reclaim "
     "first, 2 exhausted, 3 the account is at its limit, or closed."},
    {"release", fast(release), METH_FASTCALL, "release(frames, backing, owner): give frames back."},
    {"changes", changes, METH_NOARGS, "Releases and completions so far, for wait()."},
    {"wait", fast(wait), METH_FASTCALL, "Wait until changes() differs from the number given, or a timeout in ms."},
    {"usage", usage, METH_NOARGS, "Frames in use and promised, by kind."},
    {"free", free_frames, METH_NOARGS, "Frames that nobody uses; an estimate while others take and give."},
    {"enough", enough, METH_NOARGS, "How many free frames are enough."},
    {"level", level, METH_NOARGS, "By free frames: 0 critical, 1 low, 2 mid, 3 high."},
    {"low_event", low_event, METH_NOARGS,
     "The pool's own eventfd: written when the level falls to low or below, and when an allocation must reclaim."},
    {"check", check, METH_NOARGS, "Whether all frames, promises and accounts add up, at one moment."},
    {"distribute", fast(distribute), METH_FASTCALL, "distribute(distributed): a stock a processor, or one lock."},
    {"distributed", distributed, METH_NOARGS, "Whether each processor has a stock."},
    {"uses_by", fast(uses_by), METH_FASTCALL,
     "uses_by(processor): how often it took frames while the pool was distributed."},
    {"traffic", traffic, METH_NOARGS,
     "(distributed, uses, moves): how often each processor used it, or all did, and moves between them."},
    {"above_share", fast(above_share), METH_FASTCALL,
     "above_share(number): whether the account had more than its share at the last refresh_shares()."},
    {"refresh_shares", refresh_shares, METH_NOARGS, "Compare all accounts with their shares; whether any is above."},
    {"census", fast(census), METH_FASTCALL,
     "census(caches): at one moment (usage, {account: (frames charged, pages resident)}, resident pages of no account, "
     "descriptors of pages in I/O, or that are coming or going)."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(Self::dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_doc, const_cast<char*>("FramePool(budget, distributed, /)\n\nFrames of 4 KiB under a budget (paper 4.2).")},
    {0, nullptr},
};

PyType_Slot account_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make_account)},
    {Py_tp_dealloc, reinterpret_cast<void*>(SelfAccount::dealloc)},
    {Py_tp_methods, account_methods},
    {Py_tp_doc, const_cast<char*>("Account(pool, limit, /)\n\nThe frames of one client (paper 4.2).")},
    {0, nullptr},
};
PyType_Spec account_spec = {"k42._native.Account", sizeof(SelfAccount), 0,
                            Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, account_slots};

PyType_Spec spec = {"k42._native.FramePool", sizeof(Self), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};

}  // namespace

int add_frame_pool(PyObject* module) {
    vm_types.frame_pool = add_type(module, &spec);
    return vm_types.frame_pool && add_type(module, &account_spec) ? 0 : -1;
}

}  // namespace k42::edge
