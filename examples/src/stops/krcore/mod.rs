//! krcore: connections of processes that live for milliseconds, beside what they would do without;
//! and neighbours that are hostile or die.

pub(crate) mod worker;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use carlsbad_kit::child::{Child, Role};
use carlsbad_kit::plot::{Axis, Bar, BarPlot, Kind, cdf};
use carlsbad_kit::sample::{median, quantile};
use carlsbad_kit::scratch;
use krcore::{
    Access, ByteSize, Malformed, Node, Op, RKey, RemoteSlice, Status, VirtualQueue, WorkRequest,
};

use crate::stop::{Least, Rival, Visit};
use worker::{LIMIT, Order, WORDS};

const CONNECTIONS: usize = 3000;
const FRESH: usize = 200;
const PROCESSES: usize = 6;
const KILLS: usize = 12;
/// What the specification asks of figure 1: a twentieth of what TCP takes.
const LEAST: f64 = 1.0 / 20.0;

pub(crate) fn visit(visit: &mut Visit<'_>) -> Result<()> {
    let folder = scratch::on_tmpfs()?;
    let path = folder.path().join("krcored.sock");
    visit.step("starting a node daemon, and a process that lends a table");
    let daemon = Role::main(worker::ROLE).start(&Order::Daemon { path: path.clone() })?;
    daemon.hear("ready")?;
    let owner = Role::main(worker::ROLE).start(&Order::Owner { path: path.clone() })?;
    let key = RKey(owner.hear("key")?.parse()?);
    latency(visit, &path, key)?;
    processes(visit, &path, key)?;
    neighbours(visit, &path, key)
}

fn read(
    queue: &mut VirtualQueue,
    local: &std::sync::Arc<krcore::MemoryRegion>,
    key: RKey,
    offset: u64,
) -> Result<u64> {
    let remote = RemoteSlice { key, offset };
    let work = WorkRequest::new(1, Op::Read, local.slice(0, 8), remote);
    queue.post(std::slice::from_ref(&work))?;
    let done = queue.wait(LIMIT)?;
    ensure!(done.status == Status::Success, "a READ: {}", done.status);
    let mut word = [0; 8];
    ensure!(local.read(0, &mut word), "the region is too small");
    Ok(u64::from_le_bytes(word))
}

/// Answers eight bytes with the word at that offset of the table, on each connection once.
fn tcp_server() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    // Ends with the tour.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else {
                return;
            };
            let mut bytes = [0; 8];
            if stream.read_exact(&mut bytes).is_ok() {
                let word = worker::word(u64::from_le_bytes(bytes) / 8);
                let _gone = stream.write_all(&word.to_le_bytes());
            }
        }
    });
    Ok(address)
}

fn micros(elapsed: Duration) -> f64 {
    elapsed.as_secs_f64() * 1e6
}

/// The paper's comparison: connect and first READ, by three ways.
fn latency(visit: &mut Visit<'_>, path: &Path, key: RKey) -> Result<()> {
    visit.step("connecting and reading: a pooled queue, TCP, a ring of one's own each time");
    let node = Node::attach(path, LIMIT)?;
    let local = node.register(ByteSize::kib(4), Access::Local)?;
    let address = tcp_server()?;
    let (mut pooled, mut connects, mut tcp, mut right) = (vec![], vec![], vec![], true);
    for round in 0..CONNECTIONS as u64 + 100 {
        let at = round * 37 % WORDS;
        let start = Instant::now();
        let mut queue = node.connect(node.id(), LIMIT)?;
        let connected = start.elapsed();
        let found = read(&mut queue, &local, key, at * 8)?;
        let took = start.elapsed();
        right &= found == worker::word(at);
        // TCP's turn, a third as often: it takes a hundred times as long.
        let mut by_tcp = None;
        if round % 3 == 0 {
            let start = Instant::now();
            let mut stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            stream.write_all(&(at * 8).to_le_bytes())?;
            let mut bytes = [0; 8];
            stream.read_exact(&mut bytes)?;
            by_tcp = Some(start.elapsed());
            right &= u64::from_le_bytes(bytes) == worker::word(at);
        }
        if round >= 100 {
            pooled.push(micros(took));
            connects.push(micros(connected));
            tcp.extend(by_tcp.map(micros));
        }
    }
    let mut fresh = Vec::new();
    for round in 0..FRESH as u64 {
        let start = Instant::now();
        let node = Node::attach(path, LIMIT)?;
        let local = node.register(ByteSize::kib(4), Access::Local)?;
        let mut queue = node.connect(node.id(), LIMIT)?;
        let found = read(&mut queue, &local, key, round * 8)?;
        fresh.push(micros(start.elapsed()));
        right &= found == worker::word(round);
    }
    visit.check(
        format!(
            "{CONNECTIONS} connections by each way, and every word that was read on them is the one \
             that another process had written"
        ),
        right,
    );
    let bar = |name, samples: &[f64], kind| {
        let middle = median(samples);
        let times = middle / median(&pooled);
        Bar::new(name, middle, kind).remark(format!("{middle:.2} us, {times:.0}x"))
    };
    visit.picture(
        "From nothing to the first eight bytes of another process, medians. The ring of one's own \
         is what a queue pair of one's own costs where no driver and no network is in between.",
        BarPlot::new("Connect + first READ", "us")
            .bar(bar("a queue of the pool", &pooled, Kind::Ours))
            .bar(bar("TCP loopback", &tcp, Kind::Rival))
            .bar(bar("a ring of one's own", &fresh, Kind::Rival))
            .svg(),
    );
    visit.picture(
        "The same, all of them: the tail is the scheduler's on two processors.",
        cdf(
            "Connect + first READ",
            Axis::log("us"),
            [
                ("a queue of the pool", Kind::Ours, &pooled[..]),
                ("TCP loopback", Kind::Rival, &tcp[..]),
                ("a ring of one's own", Kind::Rival, &fresh[..]),
            ],
        )
        .svg(),
    );
    visit.table(
        "Connect + first READ, in microseconds",
        vec!["how", "median", "90%", "99%"],
        [
            ("a queue of the pool: connect alone", &connects),
            ("a queue of the pool", &pooled),
            ("TCP loopback", &tcp),
            ("a ring of one's own each time", &fresh),
        ]
        .into_iter()
        .map(|(how, samples)| {
            let at = |q| format!("{:.2}", quantile(samples, q));
            vec![how.to_owned(), at(0.5), at(0.9), at(0.99)]
        })
        .collect(),
    );
    visit.figure(
        "connect + first READ, attached, isolated",
        "us",
        pooled,
        Rival {
            name: "TCP loopback connect + request",
            samples: tcp,
        },
        Least::AtMost(LEAST),
    );
    Ok(())
}

/// Processes that count in the table, all at once, without anybody who serves them.
fn processes(visit: &mut Visit<'_>, path: &Path, key: RKey) -> Result<()> {
    visit.step("short-lived processes count in the table, by one-sided FETCH_ADD");
    let adders = (0..PROCESSES)
        .map(|_| {
            Role::main(worker::ROLE).start(&Order::Add {
                path: path.to_owned(),
                key: key.0,
            })
        })
        .collect::<Result<Vec<Child>, _>>()?;
    for mut adder in adders {
        ensure!(adder.wait()?.success(), "a process that adds failed");
    }
    let node = Node::attach(path, LIMIT)?;
    let local = node.register(ByteSize::kib(4), Access::Local)?;
    let mut queue = node.connect(node.id(), LIMIT)?;
    let counted = read(&mut queue, &local, key, WORDS * 8)?;
    let expected = PROCESSES as u64 * worker::ADDS;
    visit.check(
        format!("{PROCESSES} processes attached and added {expected} times to one word, which is {counted}"),
        counted == expected,
    );
    Ok(())
}

/// A hostile queue beside a good one on the same pair; and neighbours that are killed.
fn neighbours(visit: &mut Visit<'_>, path: &Path, key: RKey) -> Result<()> {
    visit.step("a hostile neighbour, and neighbours that are killed");
    let node = Node::attach(path, LIMIT)?;
    let local = node.register(ByteSize::kib(4), Access::Local)?;
    let mut good = node.connect(node.id(), LIMIT)?;
    let mut bad = node.connect(node.id(), LIMIT)?;
    let before = node.stats()?;
    let (mut refused, mut right) = (0, true);
    for round in 0..2000_u64 {
        let remote = match round % 3 {
            0 => RemoteSlice {
                key: RKey(4000),
                offset: 0,
            },
            1 => RemoteSlice {
                key,
                offset: 1 << 40,
            },
            _ => RemoteSlice { key, offset: 4 },
        };
        let op = if round % 3 == 2 {
            Op::FetchAdd { add: 1 }
        } else {
            Op::Read
        };
        let work = WorkRequest::new(round, op, local.slice(8, 8), remote);
        refused += match bad.post(std::slice::from_ref(&work)) {
            Err(why) => u64::from(why.why == Malformed::Unaligned),
            Ok(_) => u64::from(matches!(bad.wait(LIMIT)?.status, Status::Refused(_))),
        };
        let at = round % WORDS;
        right &= read(&mut good, &local, key, at * 8)? == worker::word(at);
    }
    let rebuilt = node.stats()?.rebuilt - before.rebuilt;
    visit.check(
        format!(
            "{refused} of 2000 hostile requests were refused, and no request of the neighbour on \
             the same queue pair failed"
        ),
        refused == 2000 && right && rebuilt == 0,
    );
    let mut rng = carlsbad_kit::seed::Rng::with_seed(22);
    let (mut slowest, mut right) = (Duration::ZERO, true);
    let regions = node.stats()?.regions;
    for _ in 0..KILLS {
        let mut victim = Role::main(worker::ROLE).start(&Order::Busy {
            path: path.to_owned(),
            key: key.0,
        })?;
        victim.hear("ready")?;
        let end = Instant::now() + Duration::from_micros(rng.u64(0..20_000));
        while Instant::now() < end {
            right &= read(&mut good, &local, key, 0)? == worker::word(0);
        }
        victim.kill();
        let start = Instant::now();
        while node.stats()?.regions != regions {
            ensure!(start.elapsed() < LIMIT, "a dead process keeps its regions");
            std::thread::sleep(Duration::from_micros(200));
        }
        slowest = slowest.max(start.elapsed());
    }
    let context = "the daemon has other numbers than it should";
    let clients = node.stats().context(context)?.clients;
    visit.check(
        format!(
            "{KILLS} neighbours were killed in the midst of it: everything of theirs was given back \
             within {:.1} ms, and no request here failed",
            slowest.as_secs_f64() * 1e3
        ),
        right && slowest < Duration::from_millis(500) && clients <= 3,
    );
    Ok(())
}
