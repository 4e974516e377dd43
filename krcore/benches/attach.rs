//! Figures 3 and 8: processes that attach for the first time, one, and 240 at once.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod rig;

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use carlsbad_kit::child::{self, Role};
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{Interleaved, time_ms};
use krcore::{Access, ByteSize, Node, Op, Status, WorkRequest};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use rig::{SECOND, Served};

const FIRST: &str = "first";
const CROWD: &str = "crowd";

/// What any attaching has to do: a connection, a memfd that is handed over, a mapping.
fn raw(path: &Path) -> memmap2::MmapMut {
    let socket = UnixStream::connect(path).unwrap();
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::empty(),
    )
    .unwrap();
    let descriptor = match message.cmsgs().unwrap().next() {
        Some(ControlMessageOwned::ScmRights(fds)) => fds.first().copied(),
        _ => None,
    };
    // SAFETY: the kernel has just made it for this process.
    let fd = unsafe { OwnedFd::from_raw_fd(descriptor.unwrap()) };
    // SAFETY: nobody else maps it.
    unsafe { memmap2::MmapMut::map_mut(&fd).unwrap() }
}

/// Hands a fresh memfd to whoever connects.
fn raw_server(listener: &UnixListener) {
    for socket in listener.incoming() {
        let Ok(socket) = socket else {
            return;
        };
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let memfd = nix::sys::memfd::memfd_create(c"raw", flags).unwrap();
        nix::unistd::ftruncate(&memfd, 1 << 20).unwrap();
        let rights = [memfd.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&rights)];
        let part = [IoSlice::new(b"!")];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let _gone = sendmsg::<()>(socket.as_raw_fd(), &part, &control, flags, None);
    }
}

fn read_once(node: &Node) {
    let memory = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
    let mut queue = node.connect(node.id(), SECOND).unwrap();
    let read = WorkRequest::new(1, Op::Read, memory.slice(0, 8), memory.remote(8));
    queue.post(&[read]).unwrap();
    let limit = 30 * SECOND;
    assert_eq!(queue.wait(limit).unwrap().status, Status::Success);
}

fn play() -> bool {
    if let Some((ours, theirs, raw_first)) = child::arguments::<(PathBuf, PathBuf, bool)>(FIRST) {
        let attach = || time_ms(|| Node::attach(&ours, SECOND).unwrap()) * 1e3;
        let plain = || time_ms(|| raw(&theirs)) * 1e3;
        let (a, b);
        if raw_first {
            b = plain();
            a = attach();
        } else {
            a = attach();
            b = plain();
        }
        child::tell(format!("{a} {b}"));
        return true;
    }
    if let Some(path) = child::arguments::<PathBuf>(CROWD) {
        child::tell("ready");
        child::wait_for_parent();
        let limit = 30 * SECOND;
        let node = Node::attach(&path, limit).unwrap();
        read_once(&node);
        child::tell("done");
        // It stays until all have come.
        child::wait_for_parent();
        return true;
    }
    false
}

fn main() {
    if rig::play() || play() {
        return;
    }
    let served = Served::start();
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    let listener = UnixListener::bind(&plain).unwrap();
    // Lives as long as the bench.
    std::thread::spawn(move || raw_server(&listener));
    let mut both = Interleaved::default();
    for round in 0..if is_quick() { 1 } else { 61 } {
        let role = Role::main(FIRST).start(&(served.path(), &plain, round % 2 == 0));
        let mut role = role.unwrap();
        let told = role.hear_any().unwrap();
        let mut numbers = told.split(' ').map(|number| number.parse::<f64>().unwrap());
        both.ours.push(numbers.next().unwrap());
        both.rival.push(numbers.next().unwrap());
        role.wait().unwrap();
    }
    let what = "first attach of a process";
    let figure = Figure::new("krcore/3", what, "us");
    let rival = "raw Unix socket + memfd + mmap";
    figure.against(rival, both).emit().unwrap();

    let count = if is_quick() { 4 } else { 240 };
    let mut samples = Vec::new();
    for _ in 0..if is_quick() { 1 } else { 5 } {
        let mut crowd: Vec<_> = (0..count)
            .map(|_| Role::main(CROWD).start(&served.path()).unwrap())
            .collect();
        for one in &crowd {
            one.hear("ready").unwrap();
        }
        let start = Instant::now();
        for one in &mut crowd {
            one.say("go").unwrap();
        }
        for one in &crowd {
            one.hear("done").unwrap();
        }
        samples.push(start.elapsed().as_secs_f64());
    }
    let what = "240 processes that are there attach, register, connect and READ, all at once";
    let figure = Figure::new("krcore/8", what, "s").samples(samples);
    figure.emit().unwrap();
}
