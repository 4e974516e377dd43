//! `tetris serve`.

use std::io;
use std::path::PathBuf;

use nix::sys::signal::{SigSet, Signal};
use tetris_store::agent::{Access, Agent, AgentConfig};
use tracing_subscriber::EnvFilter;

use crate::backend::socket_from_env;
use crate::options::{Global, Serve};
use crate::output;

/// Serves until SIGTERM or SIGINT.
pub(crate) fn serve(global: &Global, serve: &Serve) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();
    let mut store = global.store_config();
    store.keep_alive = serve.keep_alive;
    store.quota = serve.quota;
    let beside = || {
        let mut path = store.root.as_os_str().to_owned();
        path.push(".socket");
        PathBuf::from(path)
    };
    let named = serve.socket.clone().or_else(|| global.agent.clone());
    let socket = named.or_else(socket_from_env);
    let socket = socket.unwrap_or_else(beside);
    let mut config = AgentConfig::new(socket, store);
    config.sweep_every = serve.sweep_every;
    config.domains[0].quota_per_user = serve.quota_per_user;
    if !serve.users.is_empty() || !serve.groups.is_empty() {
        config.domains[0].access = Access::Only {
            users: serve.users.clone(),
            groups: serve.groups.clone(),
        };
    }
    // Blocked before there is any other thread, so that all inherit it and only `wait` gets them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let agent = Agent::start(config)?;
    if global.json {
        output::json(&serde_json::json!({ "socket": agent.socket() }))?;
    } else {
        output::line(format!("serving at {}", agent.socket().display()))?;
    }
    let signal = signals.wait()?;
    tracing::info!(%signal, "stopping");
    agent.stop_handle().stop();
    agent.wait();
    Ok(())
}
