//! Looks at a node daemon: is it there, how fast is it, what does it do.
#![allow(
    clippy::print_stdout,
    reason = "a command-line tool writes its results there"
)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use krcore::{Access, ByteSize, Mode, Node, NodeId, Op, Status, WorkRequest};
use serde_json::json;

/// Looks at a node daemon.
#[derive(Debug, Parser)]
#[command(name = "krcore", version)]
struct Arguments {
    /// The daemon's socket.
    #[arg(long, global = true, default_value = "/run/krcored.sock")]
    socket: PathBuf,
    /// Answers in JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Attaches, connects to this machine's node, and READs 8 bytes, again and again.
    Ping {
        /// How many connections.
        #[arg(long, default_value_t = 1000)]
        count: u32,
        /// Executes in this process, on mapped memory, where the daemon allows it.
        #[arg(long)]
        trusted: bool,
    },
    /// What the daemon has counted, and what it has now.
    Stat,
}

const LIMIT: Duration = Duration::from_secs(5);

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.command {
        Command::Ping { count, trusted } => ping(&arguments, count, trusted),
        Command::Stat => stat(&arguments),
    }
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

fn ping(arguments: &Arguments, count: u32, trusted: bool) -> Result<()> {
    let mode = if trusted {
        Mode::Trusted
    } else {
        Mode::Isolated
    };
    let start = Instant::now();
    let node = Node::attach_as(&arguments.socket, mode, LIMIT)?;
    let attach = start.elapsed();
    let memory = node.register(ByteSize::kib(4), Access::ReadWrite)?;
    ensure!(
        memory.write(8, &42_u64.to_le_bytes()),
        "the region is too small"
    );
    let (mut connects, mut reads) = (Vec::new(), Vec::new());
    for id in 0..u64::from(count.max(1)) {
        let start = Instant::now();
        let mut queue = node.connect(node.id(), LIMIT)?;
        let connected = Instant::now();
        let read = WorkRequest::new(id, Op::Read, memory.slice(0, 8), memory.remote(8));
        queue.post(&[read])?;
        let done = queue.wait(LIMIT)?;
        let read = connected.elapsed();
        ensure!(
            done.id == id && done.status == Status::Success,
            "READ: {}",
            done.status
        );
        let mut bytes = [0; 8];
        ensure!(
            memory.read(0, &mut bytes) && u64::from_le_bytes(bytes) == 42,
            "the READ brought something else than what was there"
        );
        connects.push((connected - start).as_secs_f64() * 1e6);
        reads.push(read.as_secs_f64() * 1e6);
    }
    let NodeId(number) = node.id();
    let (attach, connect, read) = (
        attach.as_secs_f64() * 1e6,
        median(&mut connects),
        median(&mut reads),
    );
    if arguments.json {
        let answer = json!({
            "node": number, "attach_us": attach, "connects": connects.len(),
            "connect_us": connect, "read_us": read,
        });
        println!("{answer}");
    } else {
        println!("node {number}: attached in {attach:.1} us");
        println!(
            "{} connections, medians: connect {connect:.2} us, first READ {read:.2} us",
            connects.len()
        );
    }
    Ok(())
}

fn stat(arguments: &Arguments) -> Result<()> {
    let node = Node::attach(&arguments.socket, LIMIT)?;
    let stats = node.stats()?;
    let value = serde_json::to_value(stats).context("cannot write the numbers as JSON")?;
    if arguments.json {
        println!("{value}");
        return Ok(());
    }
    println!("{}", node.id());
    if let Some(all) = value.as_object() {
        for (name, count) in all {
            println!("{:>18}  {count}", name.replace('_', " "));
        }
    }
    Ok(())
}
