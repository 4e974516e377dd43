//! The node daemon: owns a node's queue pairs, and executes for the processes that attach to it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use krcore::fabric::Fabric;
use krcore::{Config, Daemon, DaemonOptions, Node, NodeId, ShmFabric, Stats};
#[cfg(feature = "tcp")]
use krcore::{PresharedKey, TcpFabric, TcpOptions};
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
    /// Where daemons of other machines reach this one: 0.0.0.0:7471, say. Needs --key-file.
    #[cfg(feature = "tcp")]
    #[arg(long, requires = "key_file")]
    listen: Option<SocketAddr>,
    /// A node of another machine, and where its daemon listens: 2=10.0.0.2:7471. Once for each.
    #[cfg(feature = "tcp")]
    #[arg(long = "peer", value_name = "ID=ADDR", value_parser = peer, requires = "key_file")]
    peers: Vec<(NodeId, SocketAddr)>,
    /// The key that all daemons hold: 64 hexadecimal digits (openssl rand -hex 32), readable by
    /// nobody else.
    #[cfg(feature = "tcp")]
    #[arg(long)]
    key_file: Option<PathBuf>,
    /// For how long, in milliseconds, another daemon may be silent before its link is given up.
    #[cfg(feature = "tcp")]
    #[arg(long, default_value_t = 500)]
    silence: u64,
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

#[cfg(feature = "tcp")]
fn peer(text: &str) -> Result<(NodeId, SocketAddr)> {
    let (node, at) = text.split_once('=').context("it has to be ID=ADDR:PORT")?;
    let node = node.parse().context("the node's number")?;
    Ok((NodeId(node), at.parse().context("the address")?))
}

/// Shared memory, or TCP where other machines are to be reached.
fn fabric(arguments: &Arguments) -> Result<Arc<dyn Fabric>> {
    #[cfg(feature = "tcp")]
    if let Some(path) = &arguments.key_file {
        let mut options = TcpOptions::new(PresharedKey::from_file(path)?);
        options.listen = arguments.listen;
        options.peers = arguments.peers.iter().copied().collect();
        options.limit = Duration::from_millis(arguments.silence);
        let fabric = TcpFabric::new(options)?;
        if let Some(at) = fabric.local_addr() {
            tracing::info!(%at, "daemons of other machines are served");
        }
        return Ok(Arc::new(fabric));
    }
    let _none = arguments;
    Ok(Arc::new(ShmFabric::new()))
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
    let node = Node::on(fabric(&arguments)?, NodeId(arguments.node), config)?;
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
