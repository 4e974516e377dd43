//! `containerd-shim-rund-v2`: containerd's containers in these sandboxes, as the runtime
//! `io.containerd.rund.v2`.
//!
//! One shim serves all containers of a containerd namespace, so that templates, the pool of control
//! groups and the page cache of images are shared between them. It ends a while after the last
//! container is gone. What is in force for a container stands in `rund.json` in its bundle.
#![allow(clippy::print_stderr, reason = "a program speaks to who started it")]

mod engine;
mod metrics;
mod mounts;
mod service;
mod stdio;
mod task;

use containerd_shim as shim;

/// The runtime's name, as `ctr run --runtime` has it.
const RUNTIME: &str = "io.containerd.rund.v2";

fn main() {
    rund_rt::init();
    let config = shim::Config {
        // Sandboxes are waited for by who started them.
        no_reaper: true,
        no_sub_reaper: true,
        ..shim::Config::default()
    };
    shim::run::<service::Service>(RUNTIME, Some(config));
}
