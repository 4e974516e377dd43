//! The node daemon: owns a node's queue pairs, and executes for the processes that attach to it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use krcore::{Config, Daemon, DaemonOptions, Node, NodeId, ShmFabric, Stats};
use nix::sys::signal::{SigSet, Signal};

/// Serves the processes of this machine: each attaches at the socket, and connects from there in
/// microseconds.
#[derive(Debug, Parser)]
#[command(name = "krcored", version)]
struct Arguments {
    /// Where processes attach.
    #[arg(long, default_value = "/run/krcored.sock")]
    socket: PathBuf,
    /// This node's number.
    #[arg(long, default_value_t = 1)]
    node: u64,
    /// Lets processes map the memory of others and execute on it themselves.
    #[arg(long)]
    trusted: bool,
    /// The most processes.
    #[arg(long, default_value_t = 4096)]
    clients: usize,
    /// Threads that execute; half of the CPUs without it.
    #[arg(long)]
    executors: Option<usize>,
    /// For how long, in milliseconds, what a peer publishes of its memory is believed.
    #[arg(long, default_value_t = 1000)]
    lease: u64,
    /// Where metrics are served, as Prometheus reads them: 127.0.0.1:9464, say.
    #[arg(long)]
    metrics: Option<SocketAddr>,
    /// How long, in milliseconds, processes have to leave when the daemon is to end.
    #[arg(long, default_value_t = 5000)]
    drain: u64,
}

fn main() -> Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    // Before any thread is started, so that all have it.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("cannot block signals")?;

    let config = Config {
        lease: Duration::from_millis(arguments.lease),
        ..Config::default()
    };
    let node = Node::embedded(ShmFabric::new(), NodeId(arguments.node), config)?;
    let mut options = DaemonOptions {
        trusted: arguments.trusted,
        clients: arguments.clients,
        ..DaemonOptions::default()
    };
    if let Some(executors) = arguments.executors {
        options.executors = executors;
    }
    let daemon = Daemon::start(&arguments.socket, node, options)?;
    let stop = Arc::new(AtomicBool::new(false));
    let listener = match arguments.metrics {
        Some(address) => {
            let listener = TcpListener::bind(address)
                .with_context(|| format!("cannot serve metrics at {address}"))?;
            Some((listener.local_addr()?, listener))
        }
        None => None,
    };
    tracing::info!(socket = %arguments.socket.display(), node = arguments.node, "ready");
    std::thread::scope(|scope| -> Result<()> {
        let address = listener.as_ref().map(|(address, _)| *address);
        if let Some((_, listener)) = &listener {
            scope.spawn(|| serve_metrics(listener, &daemon, &stop));
        }
        let signal = signals.wait().context("cannot wait for signals")?;
        tracing::info!(%signal, "no more processes are taken");
        if !daemon.drain(Duration::from_millis(arguments.drain)) {
            tracing::warn!("some processes have not left");
        }
        stop.store(true, Ordering::SeqCst);
        if let Some(address) = address {
            // Wakes the thread, which waits for a connection.
            let _connected = std::net::TcpStream::connect(address);
        }
        Ok(())
    })
}

fn serve_metrics(listener: &TcpListener, daemon: &Daemon, stop: &AtomicBool) {
    for stream in listener.incoming() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok(mut stream) = stream else {
            continue;
        };
        let limit = Some(Duration::from_secs(1));
        let timed = stream
            .set_read_timeout(limit)
            .and_then(|()| stream.set_write_timeout(limit));
        if timed.is_err() {
            continue;
        }
        // Whatever is asked for, the answer is the same.
        let _asked = stream.read(&mut [0; 4096]);
        let body = metrics(&daemon.stats());
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n";
        let length = body.len();
        let _gone = write!(
            stream,
            "{head}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
    }
}

fn metrics(stats: &Stats) -> String {
    let all = [
        (
            "clients",
            "gauge",
            "Processes that are attached.",
            stats.clients,
        ),
        (
            "virtual_queues",
            "gauge",
            "Virtual queues there are.",
            stats.virtual_queues,
        ),
        (
            "regions",
            "gauge",
            "Regions that are registered.",
            stats.regions,
        ),
        (
            "peers",
            "gauge",
            "Peers whose address is cached.",
            stats.peers,
        ),
        (
            "queue_pairs_total",
            "counter",
            "Queue pairs that were ever created.",
            stats.queue_pairs,
        ),
        (
            "rebuilt_total",
            "counter",
            "Queue pairs that were rebuilt.",
            stats.rebuilt,
        ),
        (
            "executed_total",
            "counter",
            "Requests that were executed.",
            stats.executed,
        ),
        (
            "refused_total",
            "counter",
            "Requests that a check refused.",
            stats.refused,
        ),
        (
            "meta_reads_total",
            "counter",
            "One-sided READs of metadata tables.",
            stats.meta_reads,
        ),
        (
            "peers_asked_total",
            "counter",
            "Peers that were asked themselves.",
            stats.peers_asked,
        ),
        (
            "messages_dropped_total",
            "counter",
            "Messages that arrived for a listener that had gone.",
            stats.messages_dropped,
        ),
    ];
    all.iter()
        .map(|(name, kind, help, value)| {
            format!(
                "# HELP krcore_{name} {help}\n# TYPE krcore_{name} {kind}\nkrcore_{name} {value}\n"
            )
        })
        .collect()
}
