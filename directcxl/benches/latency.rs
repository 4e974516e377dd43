//! Figures 1 and 2: what a load of far memory costs, beside what systems do that cannot load.
//!
//! `process_vm_readv` stands in for one-sided RDMA: one side asks, the other's processor does
//! nothing. Both sides are local memory, so it has no network in it: a real one costs more. Page swap
//! is by `userfaultfd` with a tenth of the memory here, from local memory and over TCP.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod chase;

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{self, Child, Role as ChildRole};
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::page_swap::{PAGE, PageSwap};
use carlsbad_kit::sample::{Interleaved, interleave, median};
use carlsbad_kit::scratch;
use carlsbad_types::ByteSize;
use chase::{LINE, chase, cycle, write};
use directcxl::{Contents, Epoch, FileHdm, FormatOptions, Namespace, NamespaceOptions, Pool, Role};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

const OWNER: &str = "directcxl owner";
const RING: &str = "directcxl ring";
/// The ring's words: a request, and the number of the one that was served last.
const ASKED: u64 = 0;
const SERVED: u64 = 64;
const ANSWER: u64 = 128;

fn main() {
    if let Some(path) = child::arguments::<PathBuf>(OWNER) {
        return own(path);
    }
    if let Some(path) = child::arguments::<PathBuf>(RING) {
        return serve_ring(path);
    }
    let figures = [
        Figure::new(
            "directcxl/1",
            "64 B pointer chase over 512 MiB, direct, beside a one-sided copy",
            "ns",
        ),
        Figure::new(
            "directcxl/2",
            "64 B pointer chase over 512 MiB, direct, beside page swap with a tenth of it here",
            "ns",
        ),
        Figure::new(
            "directcxl/2b",
            "64 B pointer chase over 512 MiB, direct, beside page swap over TCP with a tenth of it here",
            "ns",
        ),
    ];
    for capability in [Capability::HugeTlb, Capability::Userfaultfd] {
        if !capability.is_present() {
            for figure in figures {
                figure.without(capability).emit().unwrap();
            }
            return;
        }
    }
    let length = if is_quick() { 16 << 20 } else { 512 << 20 };
    let huge = scratch::on_hugetlbfs(length + (8 << 20)).unwrap();
    let path = huge.path().join("pool");
    let file = FileHdm::create(&path, ByteSize::new(length + (8 << 20))).unwrap();
    let pool = Pool::format(file, FormatOptions::default()).unwrap();
    let options = NamespaceOptions {
        contents: Contents::Kept,
        populate: true,
    };
    let memory = pool
        .create("chase", ByteSize::new(length), options)
        .unwrap();
    drop(
        pool.create("ring", ByteSize::mib(2), NamespaceOptions::default())
            .unwrap(),
    );
    let lines = length as usize / LINE;
    let cycle = cycle(lines, 1);
    write(&memory, &cycle);

    let [one, two, three] = figures;
    let (samples, note) = one_sided(&path, &pool, &memory, &cycle);
    one.against("process_vm_readv of 64 B", samples)
        .note(note)
        .emit()
        .unwrap();
    let samples = swapped(&memory, &cycle, local_source(&memory, length as usize));
    two.against("userfaultfd page swap", samples)
        .note("4 KiB pages, a tenth of them here, the rest in local memory")
        .emit()
        .unwrap();
    let (fetch, server) = tcp_source(&memory, length as usize);
    let samples = swapped(&memory, &cycle, fetch);
    server.join().unwrap();
    three
        .against("userfaultfd page swap over TCP loopback", samples)
        .note("4 KiB pages, a tenth of them here, the rest behind a loopback connection")
        .emit()
        .unwrap();
}

/// Steps of ours in a sample: some ten milliseconds.
fn steps() -> usize {
    if is_quick() { 1_000 } else { 100_000 }
}

fn rounds() -> (usize, usize) {
    if is_quick() { (0, 1) } else { (2, 21) }
}

/// The other process: it is attached to the same memory, and sleeps.
fn own(path: PathBuf) {
    let pool = Pool::open(FileHdm::open(path).unwrap(), Role::Reader).unwrap();
    let memory = pool.attach_populated("chase").unwrap();
    child::tell(memory.as_ptr().as_ptr().addr());
    child::wait_for_parent();
}

fn start(role: &str, path: &PathBuf) -> Child {
    ChildRole::main(role).start(path).unwrap()
}

fn one_sided(
    path: &PathBuf,
    pool: &Pool,
    memory: &Namespace,
    cycle: &[u32],
) -> (Interleaved, String) {
    let owner = start(OWNER, path);
    let there: usize = owner.hear_any().unwrap().parse().unwrap();
    let pid = Pid::from_raw(owner.id() as i32);
    let base = memory.as_ptr().as_ptr().cast_const();
    let mut at = 0;
    let mut ours = || {
        // SAFETY: the namespace holds the cycle, and lives.
        let (now, ns) = unsafe { chase(base, at, steps()) };
        at = now;
        ns
    };
    let mut far = 1;
    let copies = steps() / 5;
    let mut rival = || {
        let start = std::time::Instant::now();
        let mut line = [0u8; LINE];
        for _ in 0..copies {
            let remote = [RemoteIoVec {
                base: there + far * LINE,
                len: LINE,
            }];
            let read = process_vm_readv(pid, &mut [IoSliceMut::new(&mut line)], &remote).unwrap();
            assert_eq!(read, LINE);
            let next = u32::from_le_bytes([line[0], line[1], line[2], line[3]]) as usize;
            debug_assert_eq!(next, cycle[far] as usize);
            far = next;
        }
        start.elapsed().as_secs_f64() * 1e9 / copies as f64
    };
    let (warm_up, rounds) = rounds();
    let samples = interleave(warm_up, rounds, &mut ours, &mut rival);
    let ring = ring(path, pool, cycle, if is_quick() { 1 } else { 5 });
    let note = format!(
        "2 MiB pages; both sides are local memory, which stands in for one-sided RDMA; \
         a READ ring in shared memory with a spinning server takes {:.0} ns",
        median(&ring)
    );
    (samples, note)
}

/// A server that spins on requests: the fairer rival, for the price of a processor.
fn serve_ring(path: PathBuf) {
    let pool = Pool::open(FileHdm::open(path).unwrap(), Role::Writer(Epoch::CURRENT)).unwrap();
    let (memory, ring) = (pool.attach("chase").unwrap(), pool.attach("ring").unwrap());
    let (asked, served) = (ring.atomic(ASKED).unwrap(), ring.atomic(SERVED).unwrap());
    child::tell("ready");
    let mut done = 0u64;
    loop {
        let now = asked.load(Ordering::Acquire);
        if now >> 32 == done {
            std::hint::spin_loop();
            continue;
        }
        if now == u64::MAX {
            return;
        }
        // SAFETY: indices of the cycle are within the namespace.
        let words =
            unsafe { chase::load(memory.as_ptr().as_ptr().cast_const(), now as u32 as usize) };
        for (i, word) in words.iter().enumerate() {
            ring.atomic(ANSWER + 8 * i as u64)
                .unwrap()
                .store(*word, Ordering::Relaxed);
        }
        done = now >> 32;
        served.store(done, Ordering::Release);
    }
}

fn ring(path: &PathBuf, pool: &Pool, cycle: &[u32], rounds: usize) -> Vec<f64> {
    let ring = pool.attach("ring").unwrap();
    let (asked, served) = (ring.atomic(ASKED).unwrap(), ring.atomic(SERVED).unwrap());
    let server = start(RING, path);
    server.hear("ready").unwrap();
    let (mut at, mut ticket) = (2usize, 0u64);
    let mut samples = Vec::new();
    for _ in 0..rounds {
        let count = steps() / 5;
        let start = std::time::Instant::now();
        for _ in 0..count {
            ticket += 1;
            asked.store(ticket << 32 | at as u64, Ordering::Release);
            while served.load(Ordering::Acquire) != ticket {
                std::hint::spin_loop();
            }
            let next = ring.atomic(ANSWER).unwrap().load(Ordering::Relaxed) as u32 as usize;
            assert_eq!(next, cycle[at] as usize);
            at = next;
        }
        samples.push(start.elapsed().as_secs_f64() * 1e9 / count as f64);
    }
    asked.store(u64::MAX, Ordering::Release);
    samples
}

fn swapped(
    memory: &Namespace,
    cycle: &[u32],
    fetch: impl FnMut(usize, &mut [u8]) + Send + 'static,
) -> Interleaved {
    let length = cycle.len() * LINE;
    let swap = PageSwap::new(length, length / PAGE / 10, fetch).unwrap();
    // The cache is as full as it gets before anything is measured.
    for page in 0..length / PAGE {
        // SAFETY: within the range, which lives.
        unsafe { swap.as_ptr().wrapping_add(page * PAGE).read_volatile() };
    }
    let base = memory.as_ptr().as_ptr().cast_const();
    let (mut near, mut far) = (0, 0);
    let (warm_up, rounds) = if is_quick() { (0, 1) } else { (1, 11) };
    interleave(
        warm_up,
        rounds,
        || {
            // SAFETY: the namespace holds the cycle, and lives.
            let (now, ns) = unsafe { chase(base, near, steps()) };
            near = now;
            ns
        },
        || {
            // SAFETY: the range holds the same cycle, fetched page by page.
            let (now, ns) = unsafe { chase(swap.as_ptr(), far, steps() / 50) };
            far = now;
            ns
        },
    )
}

/// A copy of the memory, as a memory server would hold it.
fn copy_of(memory: &Namespace, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read(0, &mut bytes).unwrap();
    bytes
}

fn local_source(
    memory: &Namespace,
    length: usize,
) -> impl FnMut(usize, &mut [u8]) + Send + 'static {
    let bytes = copy_of(memory, length);
    move |page, into| into.copy_from_slice(&bytes[page * PAGE..][..PAGE])
}

fn tcp_source(
    memory: &Namespace,
    length: usize,
) -> (
    impl FnMut(usize, &mut [u8]) + Send + 'static,
    std::thread::JoinHandle<()>,
) {
    let bytes = copy_of(memory, length);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    near.set_nodelay(true).unwrap();
    let server = std::thread::spawn(move || {
        let (mut far, _) = listener.accept().unwrap();
        far.set_nodelay(true).unwrap();
        let mut page = [0; 8];
        while far.read_exact(&mut page).is_ok() {
            let page = u64::from_le_bytes(page) as usize;
            let parts = [IoSlice::new(&bytes[page * PAGE..][..PAGE])];
            let sent = far.write_vectored(&parts).unwrap();
            far.write_all(&bytes[page * PAGE + sent..][..PAGE - sent])
                .unwrap();
        }
    });
    let fetch = move |page: usize, into: &mut [u8]| {
        near.write_all(&(page as u64).to_le_bytes()).unwrap();
        near.read_exact(into).unwrap();
    };
    (fetch, server)
}
