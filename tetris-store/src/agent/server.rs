//! The agent's socket, its threads, and who may connect.

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt,
    listen, shutdown, socket, sockopt,
};
use nix::unistd::geteuid;

use super::channel::Channel;
use super::owners::Owners;
use super::session::Session;
use super::watch::Watch;
use super::wire::{Refusal, Reply};
use super::{Access, AgentConfig, Served};
use crate::error::{Error, Result};
use crate::lock::{Lock, try_lock};
use crate::regular::open_or_make;
use crate::store::Store;

/// How long a stopping agent waits for requests that it is working on.
const LAST_REQUESTS: Duration = Duration::from_secs(10);

/// A running agent.
///
/// Its threads, `tetris-agent` (connections), `tetris-sweep` and one `tetris-client` a connection,
/// end with it: [`Agent::wait`] and drop join them.
#[derive(Debug)]
pub struct Agent {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    stop: StopHandle,
}

/// Stops an agent, from any thread.
#[derive(Debug, Clone)]
pub struct StopHandle(Arc<EventFd>);

impl StopHandle {
    /// The agent takes no more connections, finishes what it is doing, hangs up on everybody, and
    /// removes its socket. Clients with leases of their own keep them.
    pub fn stop(&self) {
        // It is never read, so it stays set. Writing fails only where it has been set 2^64 times.
        let _ = self.0.write(1);
    }
}

/// Who is at the other end, by the kernel's word.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer {
    pub(super) user: u32,
    pub(super) group: u32,
    /// Root, or the agent's own user: not bound by quotas and owners.
    pub(super) admin: bool,
}

#[derive(Debug)]
pub(super) struct Domain {
    pub(super) served: Served,
    pub(super) store: Store,
    pub(super) owners: Owners,
}

impl Domain {
    pub(super) fn admits(&self, peer: Peer) -> bool {
        peer.admin
            || match &self.served.access {
                Access::Everyone => true,
                Access::Only { users, groups } => {
                    users.contains(&peer.user) || groups.contains(&peer.group)
                }
            }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: AgentConfig,
    pub(super) domains: Vec<Domain>,
    pub(super) users: Users,
    sessions: Mutex<HashMap<u64, Running>>,
    /// Serialises sweeps: the agent's own, and those that are asked for.
    pub(super) sweeping: Mutex<()>,
}

#[derive(Debug)]
struct Running {
    channel: Arc<Channel>,
    thread: JoinHandle<()>,
}

/// What each user has of the agent.
#[derive(Debug, Default)]
pub(super) struct Users(Mutex<HashMap<(u32, Taken), usize>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Taken {
    Connections,
    Files,
    Ingests,
    Leases,
    /// Those that are being made.
    Views,
}

/// A part of what a user may have, given back by drop.
#[derive(Debug)]
pub(super) struct Share {
    shared: Arc<Shared>,
    of: (u32, Taken),
    count: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values that are whole at all times.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// `count` more for `user`, who may have `limit`.
    pub(super) fn take(
        self: &Arc<Self>,
        user: u32,
        what: Taken,
        count: usize,
        limit: usize,
    ) -> Result<Share> {
        let mut users = lock(&self.users.0);
        let has = users.entry((user, what)).or_default();
        if has.saturating_add(count) > limit {
            let what = format!("{what:?}").to_lowercase();
            return Err(Refusal::TooMany.because(format!(
                "a user may have {limit} {what} of the agent at a time: give some back first"
            )));
        }
        *has += count;
        Ok(Share {
            shared: self.clone(),
            of: (user, what),
            count,
        })
    }

    /// How much `user` has taken.
    pub(super) fn taken(&self, user: u32, what: Taken) -> usize {
        lock(&self.users.0).get(&(user, what)).copied().unwrap_or(0)
    }

    pub(super) fn clients(&self) -> usize {
        lock(&self.sessions).len()
    }

    /// One sweep of `domain`.
    pub(super) fn sweep(&self, domain: &Domain) -> Result<crate::reclaim::ReclaimReport> {
        let _alone = lock(&self.sweeping);
        let report = domain.store.reclaim()?;
        if !report.freed.is_empty() {
            tracing::info!(
                models = report.freed.len(),
                bytes = %report.freed_bytes,
                "reclaimed"
            );
        }
        domain.owners.sweep(&domain.store)?;
        Watch::tidy(&domain.store)?;
        Ok(report)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut users = lock(&self.shared.users.0);
        if let Some(has) = users.get_mut(&self.of) {
            *has = has.saturating_sub(self.count);
            if *has == 0 {
                users.remove(&self.of);
            }
        }
    }
}

impl Agent {
    /// Starts an agent. A socket that a dead agent left behind is replaced; what it knew of the
    /// stores is in the stores.
    ///
    /// # Errors
    /// [`Error::AgentRunning`] where the socket or a store has a living agent; what
    /// [`Store::open`] says; [`Error::ReadOnly`]; [`Error::Io`].
    pub fn start(config: AgentConfig) -> Result<Self> {
        raise_descriptor_limit();
        let socket_lock = lock_socket(&config.socket)?;
        let mut domains = Vec::new();
        for served in &config.domains {
            let store = Store::open(served.store.clone())?;
            domains.push(Domain {
                owners: Owners::open(&store)?,
                served: served.clone(),
                store,
            });
        }
        let watch = Watch::new(domains.iter().map(|domain| domain.store.clone()))?;
        let listener = listen_at(&config.socket)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = EventFd::from_value_and_flags(0, flags)
            .map_err(Error::io("make an eventfd for", &config.socket))?;
        let shared = Arc::new(Shared {
            config,
            domains,
            users: Users::default(),
            sessions: Mutex::default(),
            sweeping: Mutex::default(),
        });
        let mut agent = Self {
            shared: shared.clone(),
            threads: Vec::new(),
            stop: StopHandle(Arc::new(stop)),
        };
        let stop = agent.stop.clone();
        let accepting = shared.clone();
        agent.spawn("tetris-agent", move || {
            accept_all(&accepting, &listener, &stop);
            drop(listener);
            remove_socket(&accepting.config.socket);
            hang_up_on_all(&accepting);
            drop(socket_lock);
        })?;
        let stop = agent.stop.clone();
        agent.spawn("tetris-sweep", move || sweep_all(&shared, &watch, &stop))?;
        tracing::info!(socket = %agent.shared.config.socket.display(), "serving");
        Ok(agent)
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)
            .map_err(Error::io("start a thread of", "the agent"))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Something that stops it.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.shared.config.socket
    }

    /// Serves until it is stopped.
    pub fn wait(mut self) {
        self.join();
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the agent panicked");
            }
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.stop();
        self.join();
    }
}

/// Every client holds at least one descriptor here: as many as we may have.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// The lock that says whether the agent of this socket lives.
fn lock_socket(socket: &Path) -> Result<File> {
    let mut name = socket.as_os_str().to_owned();
    name.push(".lock");
    let path = PathBuf::from(name);
    let file = open_or_make(&path).map_err(Error::io("open", &path))?;
    if try_lock(&file, Lock::Exclusive, &path)? {
        Ok(file)
    } else {
        Err(Error::AgentRunning { path })
    }
}

fn listen_at(path: &Path) -> Result<OwnedFd> {
    // Whoever made it is dead: we have his lock.
    remove_socket(path);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
        .map_err(Error::io("make a socket for", path))?;
    let address = UnixAddr::new(path).map_err(Error::io("listen at", path))?;
    bind(listener.as_raw_fd(), &address).map_err(Error::io("listen at", path))?;
    // Everybody may knock; `SO_PEERCRED` says who it is.
    fs::set_permissions(path, Permissions::from_mode(0o666))
        .map_err(Error::io("make reachable", path))?;
    let backlog = Backlog::new(128).unwrap_or(Backlog::MAXCONN);
    listen(&listener, backlog).map_err(Error::io("listen at", path))?;
    Ok(listener)
}

fn remove_socket(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove the socket");
        }
        _ => {}
    }
}

/// Whether it is time to stop, after at most `wait` or when `other` has something.
fn stopped(stop: &StopHandle, other: std::os::fd::BorrowedFd<'_>, wait: Duration) -> bool {
    let mut both = [
        PollFd::new(stop.0.as_fd(), PollFlags::POLLIN),
        PollFd::new(other, PollFlags::POLLIN),
    ];
    let wait = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
    match poll(&mut both, wait) {
        Ok(_) => both[0].any() == Some(true),
        Err(Errno::EINTR) => false,
        Err(error) => {
            tracing::error!(%error, "the agent cannot wait for anything any more, and stops");
            true
        }
    }
}

fn accept_all(shared: &Arc<Shared>, listener: &OwnedFd, stop: &StopHandle) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    while !stopped(stop, listener.as_fd(), Duration::from_secs(60)) {
        let connection = match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
            Ok(raw) => unsafe { OwnedFd::from_raw_fd(raw) },
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => continue,
            Err(error) => {
                // No descriptors, most likely: those who are connected go on, and may hang up.
                tracing::warn!(%error, "cannot accept a connection");
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let channel = Arc::new(Channel::new(connection));
        if let Err(error) = serve(shared, &channel, NEXT.fetch_add(1, Ordering::Relaxed)) {
            // He may be gone already, or take nothing in: he is hung up on in any case.
            let _ = channel.send(&Reply::from(error), &[], false);
        }
    }
}

fn serve(shared: &Arc<Shared>, channel: &Arc<Channel>, number: u64) -> Result<()> {
    let limits = &shared.config.limits;
    channel
        .set_deadlines(limits.patience, limits.patience)
        .map_err(Error::io("set deadlines of", &shared.config.socket))?;
    let peer = getsockopt(&channel.socket(), sockopt::PeerCredentials)
        .map_err(Error::io("ask who is at", &shared.config.socket))?;
    let peer = Peer {
        user: peer.uid(),
        group: peer.gid(),
        admin: peer.uid() == 0 || peer.uid() == geteuid().as_raw(),
    };
    // Held until the thread is in: it takes itself out.
    let mut sessions = lock(&shared.sessions);
    if sessions.len() >= limits.clients && !peer.admin {
        return Err(Refusal::TooMany.because("the agent has as many clients as it may: try later"));
    }
    let share = shared.take(peer.user, Taken::Connections, 1, limits.clients_per_user)?;
    let thread = {
        let (shared, channel) = (shared.clone(), channel.clone());
        thread::Builder::new()
            .name("tetris-client".to_owned())
            .spawn(move || {
                let _share = share;
                Session::new(&shared, &channel, peer).run();
                drop(lock(&shared.sessions).remove(&number));
            })
            .map_err(Error::io("start a thread of", "the agent"))?
    };
    sessions.insert(
        number,
        Running {
            channel: channel.clone(),
            thread,
        },
    );
    Ok(())
}

/// No more requests from anybody; answers to those under way may still go out.
fn hang_up_on_all(shared: &Shared) {
    let mut sessions: Vec<Running> = lock(&shared.sessions).drain().map(|(_, it)| it).collect();
    for session in &sessions {
        // It may have hung up itself.
        let _ = shutdown(session.channel.socket().as_raw_fd(), Shutdown::Read);
    }
    let start = Instant::now();
    while !sessions.is_empty() && start.elapsed() < LAST_REQUESTS {
        let (done, working) = sessions.into_iter().partition(|it| it.thread.is_finished());
        sessions = working;
        for session in done {
            let session: Running = session;
            if session.thread.join().is_err() {
                tracing::error!("a client's thread panicked");
            }
        }
        thread::sleep(Duration::from_millis(2));
    }
    if !sessions.is_empty() {
        // An ingest from a file system that does not answer, say. It cannot be ended from here.
        tracing::error!(
            requests = sessions.len(),
            "stopping in the middle of requests"
        );
    }
}

fn sweep_all(shared: &Shared, watch: &Watch, stop: &StopHandle) {
    let mut last = Instant::now();
    loop {
        let wait = shared.config.sweep_every.saturating_sub(last.elapsed());
        if stopped(stop, watch.descriptor(), wait) {
            return;
        }
        watch.notice();
        if last.elapsed() < shared.config.sweep_every {
            continue;
        }
        for domain in &shared.domains {
            if let Err(error) = shared.sweep(domain) {
                let root = domain.store.root().display();
                tracing::warn!(%root, %error, "a sweep did not finish");
            }
        }
        last = Instant::now();
    }
}
