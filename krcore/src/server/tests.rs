//! Hostile clients: they speak to the daemon without this crate's client, and share memory that says
//! what it likes.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::*;
use crate::region::Access;
use crate::wire::GENERATIONS;
use crate::{ByteSize, Config, Op, RemoteSlice, ShmFabric};

const SECOND: Duration = Duration::from_secs(1);

struct Rig {
    _dir: tempfile::TempDir,
    path: PathBuf,
    daemon: Daemon,
}

fn rig() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let config = Config {
        dynamic_pairs: 1,
        ..Config::default()
    };
    let node = Node::embedded(ShmFabric::new(), NodeId(1), config).unwrap();
    let options = DaemonOptions {
        executors: 1,
        ..DaemonOptions::default()
    };
    let daemon = Daemon::start(&path, node, options).unwrap();
    Rig {
        _dir: dir,
        path,
        daemon,
    }
}

/// A client of the test's own making.
struct Raw {
    socket: UnixStream,
    channel: Channel,
    _bell: OwnedFd,
}

fn dial(path: &Path) -> UnixStream {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    UnixStream::from(fd)
}

fn hear(socket: &UnixStream) -> Option<(Reply, Vec<OwnedFd>)> {
    let end = Instant::now() + SECOND;
    loop {
        match control::receive(socket.as_fd()) {
            Incoming::Packet(reply, descriptors) => return Some((reply, descriptors)),
            Incoming::Closed => return None,
            Incoming::Nothing => std::thread::sleep(Duration::from_millis(1)),
            Incoming::Broken(why) => panic!("{why}"),
        }
        assert!(Instant::now() < end, "no answer");
    }
}

fn ask(socket: &UnixStream, request: &Request, with: &[BorrowedFd<'_>]) -> (Reply, Vec<OwnedFd>) {
    control::send(socket.as_fd(), request, with).unwrap();
    hear(socket).unwrap()
}

impl Raw {
    fn attach(rig: &Rig) -> Self {
        let socket = dial(&rig.path);
        let hello = Request::Hello {
            version: control::VERSION,
            trusted: false,
        };
        let (reply, mut descriptors) = ask(&socket, &hello, &[]);
        assert!(matches!(reply, Reply::Welcome { .. }));
        let bell = descriptors.pop().unwrap();
        let channel = Sealed::adopt(descriptors.pop().unwrap(), true).unwrap();
        Self {
            socket,
            channel: Channel::over(channel).unwrap(),
            _bell: bell,
        }
    }

    fn register(&self, access: Access) -> RKey {
        let memory = Sealed::create(c"hostile", 4096).unwrap();
        match ask(
            &self.socket,
            &Request::Register { access },
            &[memory.as_fd()],
        )
        .0
        {
            Reply::Registered(key) => key,
            reply => panic!("{reply:?}"),
        }
    }

    fn ring(&self, lane: usize) {
        let doorbell = self.channel.doorbell().unwrap();
        doorbell.fetch_or(1 << lane, Ordering::SeqCst);
    }

    fn is_thrown_out(&self) -> bool {
        let end = Instant::now() + SECOND;
        while Instant::now() < end {
            if matches!(
                control::receive::<Reply>(self.socket.as_fd()),
                Incoming::Closed
            ) {
                return true;
            }
            // It may be asleep.
            let _rung = nix::unistd::write(&self._bell, &1_u64.to_ne_bytes());
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

/// A well-behaved client whose requests go on throughout.
fn assert_all_is_well(rig: &Rig) {
    let node = Node::attach(&rig.path, SECOND).unwrap();
    let memory = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
    let mut queue = node.connect(node.id(), SECOND).unwrap();
    for id in 0..100 {
        let read = WorkRequest::new(id, Op::Read, memory.slice(0, 8), memory.remote(8));
        queue.post(&[read]).unwrap();
        let done = queue.wait(SECOND).unwrap();
        assert_eq!((done.id, done.status), (id, Status::Success));
    }
    assert_eq!(rig.daemon.stats().rebuilt, 0, "a shared pair was broken");
}

#[test]
fn an_index_that_cannot_be_true_throws_its_client_out() {
    let rig = rig();
    for wild in [200, 1 << 31, u32::MAX] {
        let client = Raw::attach(&rig);
        let lane = client.channel.lane(3).unwrap();
        lane.submissions.tail.store(wild, Ordering::SeqCst);
        client.ring(3);
        assert!(client.is_thrown_out(), "submissions' tail {wild}");

        let client = Raw::attach(&rig);
        let lane = client.channel.lane(63).unwrap();
        lane.completions.head.store(wild, Ordering::SeqCst);
        // It is looked at when there is no more room.
        lane.submissions.tail.store(128, Ordering::SeqCst);
        client.ring(63);
        let begun = Instant::now();
        while lane.submissions.head.load(Ordering::SeqCst) < 128 {
            assert!(begun.elapsed() < SECOND, "nothing is taken");
            let _rung = nix::unistd::write(&client._bell, &1_u64.to_ne_bytes());
            std::thread::yield_now();
        }
        lane.submissions.tail.store(129, Ordering::SeqCst);
        client.ring(63);
        assert!(client.is_thrown_out(), "completions' head {wild}");
    }
    assert_all_is_well(&rig);
}

#[test]
fn the_daemons_own_indices_are_not_read_from_shared_memory() {
    let rig = rig();
    let client = Raw::attach(&rig);
    let lane = client.channel.lane(0).unwrap();
    // What the daemon writes, the client overwrites: it harms nobody.
    lane.submissions.head.store(77, Ordering::SeqCst);
    lane.completions.tail.store(99, Ordering::SeqCst);
    lane.submissions.tail.store(1, Ordering::SeqCst);
    client.ring(0);
    let begun = Instant::now();
    while lane.completions.tail.load(Ordering::SeqCst) != 1 {
        assert!(begun.elapsed() < SECOND);
        let _rung = nix::unistd::write(&client._bell, &1_u64.to_ne_bytes());
        std::thread::yield_now();
    }
    assert_all_is_well(&rig);
}

/// Submits entries of any bytes, some of them nearly right, while another thread changes them.
#[test]
fn any_entry_and_entries_that_change_after_publishing_break_nothing() {
    let rig = rig();
    let client = Raw::attach(&rig);
    let (local, shared) = (
        client.register(Access::Local),
        client.register(Access::ReadWrite),
    );
    let resolve = Request::Resolve {
        peer: NodeId(1),
        millis: 1000,
    };
    let (known, _) = ask(&client.socket, &resolve, &[]);
    assert!(matches!(known, Reply::Address(_)));
    let lane = client.channel.lane(0).unwrap();
    let stop = AtomicBool::new(false);
    let (mut completed, mut refused) = (0_u64, 0_u64);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rng = fastrand::Rng::with_seed(3);
            while !stop.load(Ordering::Relaxed) {
                let word = &lane.submissions.words[rng.usize(..lane.submissions.words.len())];
                word.store(rng.u64(..), Ordering::Relaxed);
                if rng.u8(..) == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let mut rng = fastrand::Rng::with_seed(4);
        let (mut producer, mut consumer) = (Producer::default(), Consumer::default());
        let mut word = [0];
        let total = 200_000;
        let (mut written, begun) = (0, Instant::now());
        while completed < total {
            let entry: [u64; SUBMISSION] = if rng.bool() {
                std::array::from_fn(|_| rng.u64(..))
            } else {
                Submission {
                    op: match rng.u8(..5) {
                        0 => Op::Read,
                        1 => Op::Write,
                        2 => Op::FetchAdd { add: 1 },
                        3 => Op::Send(Service(rng.u16(..))),
                        _ => Op::Fence,
                    },
                    cookie: Cookie {
                        index: rng.u8(..),
                        generation: rng.u32(..GENERATIONS),
                    },
                    peer: NodeId(rng.u64(..3)),
                    local,
                    offset: rng.u64(..5000),
                    len: rng.u64(..5000),
                    remote: RemoteSlice {
                        key: if rng.bool() {
                            shared
                        } else {
                            RKey(rng.u32(..40))
                        },
                        offset: rng.u64(..5000),
                    },
                }
                .encode()
            };
            if written < total && producer.write(&lane.submissions, entry).unwrap() {
                written += 1;
                producer.publish(&lane.submissions);
                client.ring(0);
                let _rung = nix::unistd::write(&client._bell, &1_u64.to_ne_bytes());
            }
            while consumer.read(&lane.completions, &mut word).unwrap() {
                completed += 1;
                let (_, status) = wire::decode_completion(word[0]).unwrap();
                refused += u64::from(matches!(status, Status::Refused(_)));
                consumer.release(&lane.completions);
            }
            assert!(begun.elapsed() < 60 * SECOND, "{completed} completed");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(
        refused > 0 && refused < completed,
        "{refused} of {completed}"
    );
    assert_all_is_well(&rig);
}

#[test]
fn packets_that_make_no_sense_and_descriptors_that_are_no_memory_are_refused() {
    let rig = rig();
    let client = Raw::attach(&rig);
    let failed = |reply: Reply| match reply {
        Reply::Failed(why) => why,
        reply => panic!("{reply:?}"),
    };
    let register = Request::Register {
        access: Access::Read,
    };
    assert!(matches!(
        failed(ask(&client.socket, &register, &[]).0),
        Failure::NotSealed
    ));
    let plain = tempfile::tempfile().unwrap();
    plain.set_len(4096).unwrap();
    let unsealed =
        nix::sys::memfd::memfd_create(c"unsealed", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING)
            .unwrap();
    nix::unistd::ftruncate(&unsealed, 4096).unwrap();
    for fd in [plain.as_fd(), unsealed.as_fd(), client.socket.as_fd()] {
        let why = failed(ask(&client.socket, &register, &[fd]).0);
        assert!(matches!(why, Failure::NotSealed), "{why:?}");
    }
    // More descriptors than a packet may have: they are lost on the way, and closed.
    let many: Vec<_> = (0..20).map(|_| plain.as_fd()).collect();
    let why = failed(ask(&client.socket, &register, &many).0);
    assert!(matches!(why, Failure::Other(_)), "{why:?}");
    let again = Request::Hello {
        version: control::VERSION,
        trusted: false,
    };
    assert!(matches!(
        failed(ask(&client.socket, &again, &[]).0),
        Failure::Other(_)
    ));
    let lane = Request::Arm {
        channel: 900,
        lane: 900,
    };
    assert!(matches!(
        failed(ask(&client.socket, &lane, &[plain.as_fd()]).0),
        Failure::Other(_)
    ));
    let map = Request::Map {
        peer: NodeId(1),
        key: RKey(16),
    };
    assert!(matches!(
        failed(ask(&client.socket, &map, &[]).0),
        Failure::Other(_)
    ));
    let mut rng = fastrand::Rng::with_seed(9);
    for length in [1, 2, 7, 100, 4096, 9000] {
        let client = Raw::attach(&rig);
        let mut bytes = vec![0xFF; length];
        if length > 2 {
            rng.fill(&mut bytes[2..]);
        }
        let flags = nix::sys::socket::MsgFlags::MSG_NOSIGNAL;
        nix::sys::socket::send(client.socket.as_raw_fd(), &bytes, flags).unwrap();
        match hear(&client.socket) {
            Some((reply, _)) => drop(failed(reply)),
            None => continue,
        }
    }
    let stranger = dial(&rig.path);
    let old = Request::Hello {
        version: 0,
        trusted: false,
    };
    assert!(matches!(
        failed(ask(&stranger, &old, &[]).0),
        Failure::Other(_)
    ));
    let early = dial(&rig.path);
    assert!(matches!(
        failed(ask(&early, &Request::Stats, &[]).0),
        Failure::Other(_)
    ));
    assert_all_is_well(&rig);
}

#[test]
fn one_client_cannot_take_every_region_or_channel() {
    let rig = rig();
    let client = Raw::attach(&rig);
    for _ in 0..MAX_CLIENT_REGIONS {
        client.register(Access::Local);
    }
    let memory = Sealed::create(c"one too many", 4096).unwrap();
    let register = Request::Register {
        access: Access::Local,
    };
    let (reply, _) = ask(&client.socket, &register, &[memory.as_fd()]);
    assert!(matches!(reply, Reply::Failed(Failure::TooManyRegions(_))));
    for _ in 1..MAX_CHANNELS {
        let (reply, _) = ask(&client.socket, &Request::Channel, &[]);
        assert!(matches!(reply, Reply::Channel));
    }
    let (reply, _) = ask(&client.socket, &Request::Channel, &[]);
    assert!(matches!(reply, Reply::Failed(Failure::TooManyQueues(_))));
    assert_all_is_well(&rig);
}
