//! The other end: what a process that uses an agent holds.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::channel::{Channel, Received};
use super::wire::{AgentStats, Listed, MAX_FILES, Reply, Request};
use crate::attach::SharedModel;
use crate::backing::Objects;
use crate::error::{Error, Result};
use crate::id::{Domain, ModelId, ObjectId};
use crate::ingest::{IngestOptions, Ingested, Progress};
use crate::manifest::Manifest;
use crate::reclaim::ReclaimReport;
use crate::source::files_of_model;
use crate::store::{Store, StoreConfig};
use crate::view::{View, ViewKind};

/// How to reach an agent.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Its socket.
    pub socket: PathBuf,
    /// Which of its domains is meant.
    pub domain: Domain,
    /// How long to wait for any one message of it.
    pub deadline: Duration,
    /// Where the agent's store is mounted here as well, take leases there rather than through the
    /// connection: they outlive the agent, and files need not be passed. On by default.
    pub own_leases: bool,
}

impl ClientConfig {
    /// The defaults, for the agent at `socket`.
    pub fn at(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            domain: Domain::default(),
            deadline: Duration::from_secs(120),
            own_leases: true,
        }
    }
}

/// A connection to an agent.
///
/// One request at a time goes through it: threads that must not wait for each other's ingests have
/// connections of their own.
#[derive(Debug)]
pub struct Client {
    connection: Arc<Connection>,
    /// The agent's store, where it is mounted here.
    store: Option<Store>,
}

#[derive(Debug)]
struct Connection {
    socket: PathBuf,
    /// `None` once it broke: what came next would be the answer to another question.
    channel: Mutex<Option<Channel>>,
    /// Leases given back while a request was under way.
    detached: Mutex<Vec<ModelId>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What breaks is taken out; the rest are plain values.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    fn gone(&self, why: impl Into<String>) -> Error {
        Error::NoAgent {
            socket: self.socket.clone(),
            why: why.into(),
        }
    }

    /// Asks, and waits for the answer; what comes before it goes to `progress`.
    fn ask(
        &self,
        request: &Request,
        files: &[File],
        progress: Option<&dyn Fn(Progress)>,
    ) -> Result<(Reply, Vec<OwnedFd>)> {
        let mut channel = lock(&self.channel);
        let Some(open) = channel.take() else {
            return Err(self.gone("the connection broke before: connect again"));
        };
        let (answer, whole) = self.exchange(&open, request, files, progress);
        if whole {
            *channel = Some(open);
        }
        answer
    }

    /// Gives back what was detached meanwhile; as much of it as the agent takes in at once, unless
    /// `wait`.
    fn flush(&self, channel: &Channel, wait: bool) -> std::io::Result<()> {
        loop {
            // Not held while sending: who drops a model elsewhere does not wait for the agent.
            let Some(model) = lock(&self.detached).pop() else {
                return Ok(());
            };
            if !channel.send(&Request::Detach { model }, &[], wait)? {
                lock(&self.detached).push(model);
                return Ok(());
            }
        }
    }

    /// The answer, and whether the connection is good for another question.
    fn exchange(
        &self,
        channel: &Channel,
        request: &Request,
        files: &[File],
        progress: Option<&dyn Fn(Progress)>,
    ) -> (Result<(Reply, Vec<OwnedFd>)>, bool) {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let sent = self
            .flush(channel, true)
            .and_then(|()| channel.send(request, &files, true));
        // An agent that turns us away says why and hangs up, perhaps before it has heard anything:
        // then that is still to be read, behind one report each of the failed sending and hearing.
        let mut hung_up = 0;
        let mut unsent = None;
        if let Err(error) = sent {
            // What is too long for a packet was not sent.
            if error.kind() == ErrorKind::InvalidInput {
                return (Err(self.gone(error.to_string())), true);
            }
            unsent = Some(error.to_string());
        }
        let why = loop {
            match channel.receive::<Reply>() {
                Ok(Received::Message(Reply::Progress { done, total }, _)) => {
                    if let Some(progress) = progress {
                        progress(Progress { done, total });
                    }
                }
                Ok(Received::Message(Reply::Refused { kind, message }, _)) => {
                    let whole = unsent.is_none() && hung_up == 0;
                    return (Err(Error::AgentRefused { kind, message }), whole);
                }
                Ok(Received::Message(reply, files)) if unsent.is_none() => {
                    return (Ok((reply, files)), true);
                }
                Ok(Received::Message(..)) => {}
                Ok(Received::Garbage(why)) => break why,
                Ok(Received::Silence) => break "no answer in time".to_owned(),
                Ok(Received::HungUp) if hung_up < 1 => hung_up += 1,
                Ok(Received::HungUp) => break unsent.unwrap_or("it hung up".to_owned()),
                Err(error) => break error.to_string(),
            }
        };
        (Err(self.gone(why)), false)
    }

    fn unexpected(&self, reply: &Reply) -> Error {
        self.gone(format!("an answer to another question: {reply:?}"))
    }
}

impl Client {
    /// Connects to an agent.
    ///
    /// # Errors
    /// [`Error::NoAgent`]; [`Error::AgentRefused`] where it does not serve that domain to this user
    /// or has too many clients.
    pub fn connect(config: ClientConfig) -> Result<Self> {
        let gone = |why: String| Error::NoAgent {
            socket: config.socket.clone(),
            why,
        };
        let end = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(|error| gone(error.to_string()))?;
        let address = UnixAddr::new(&config.socket).map_err(|error| gone(error.to_string()))?;
        let raw = end.as_raw_fd();
        let channel = Channel::new(end);
        channel
            .set_deadlines(config.deadline, config.deadline)
            .map_err(|error| gone(error.to_string()))?;
        connect(raw, &address).map_err(|error| gone(error.to_string()))?;
        let connection = Arc::new(Connection {
            socket: config.socket,
            channel: Mutex::new(Some(channel)),
            detached: Mutex::default(),
        });
        let domain = config.domain.name().to_owned();
        let (root, identity) = match connection.ask(&Request::Hello { domain }, &[], None)? {
            (Reply::Welcome { root, identity }, _) => (root, identity),
            (reply, _) => return Err(connection.unexpected(&reply)),
        };
        let store = config
            .own_leases
            .then(|| the_same_store(&root, identity, &config.domain))
            .flatten();
        Ok(Self { connection, store })
    }

    /// The agent's store, where this process sees it at the agent's path and takes its own leases;
    /// `None` where it is elsewhere, not mounted here, or not to be used
    /// ([`ClientConfig::own_leases`]).
    pub const fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    fn ask(&self, request: &Request) -> Result<Reply> {
        self.connection
            .ask(request, &[], None)
            .map(|(reply, _)| reply)
    }

    fn done(&self, request: &Request) -> Result<()> {
        match self.ask(request)? {
            Reply::Done => Ok(()),
            reply => Err(self.connection.unexpected(&reply)),
        }
    }

    /// Has the agent ingest the model at `path`, whose files this process opens and passes on: the
    /// agent reads what this process may read, and nothing else.
    ///
    /// # Errors
    /// What [`open_model`](crate::open_model) says; [`Error::AgentRefused`]; [`Error::NoAgent`].
    pub fn ingest(&self, path: &Path, options: &IngestOptions<'_>) -> Result<Ingested> {
        let (files, main) = files_of_model(path)?;
        let mut files = files.into_iter().peekable();
        while files.peek().is_some() {
            let (names, batch) = files.by_ref().take(MAX_FILES).unzip();
            let batch: Vec<File> = batch;
            let request = Request::Files { names };
            match self.connection.ask(&request, &batch, None)? {
                (Reply::Done, _) => {}
                (reply, _) => return Err(self.connection.unexpected(&reply)),
            }
        }
        let request = Request::Ingest {
            label: options.label.map(str::to_owned),
            main,
        };
        let report = |progress: Progress| {
            if let Some(report) = options.progress {
                report(progress);
            }
        };
        match self.connection.ask(&request, &[], Some(&report))? {
            (Reply::Ingested(ingested), _) => Ok(ingested),
            (reply, _) => Err(self.connection.unexpected(&reply)),
        }
    }

    /// Takes a lease on the model that goes by `name` (a label, an id, the first digits of one) and
    /// gives access to its tensors.
    ///
    /// A lease of the connection's own ends with the agent; what is mapped stays mapped.
    ///
    /// # Errors
    /// [`Error::AgentRefused`], among others with [`Refusal::Unknown`](super::Refusal::Unknown);
    /// [`Error::NoAgent`].
    pub fn attach(&self, name: &str) -> Result<SharedModel> {
        if let Some(store) = &self.store {
            match store.resolve(name).and_then(|model| store.attach(&model)) {
                Err(error) => tracing::debug!(%error, "attaching through the agent instead"),
                attached => return attached,
            }
        }
        let model = name.to_owned();
        let (model, files) = match self.connection.ask(&Request::Attach { model }, &[], None)? {
            (Reply::Attached { model }, files) => (model, files),
            (reply, _) => return Err(self.connection.unexpected(&reply)),
        };
        // From here on the lease is given back, whatever happens.
        let backing = Arc::new(Lent {
            connection: self.connection.clone(),
            model,
        });
        let manifest = Manifest::decode(&self.read(files)?)?;
        Ok(SharedModel::new(model, manifest, backing, None))
    }

    /// The models that the agent has.
    ///
    /// # Errors
    /// [`Error::AgentRefused`]; [`Error::NoAgent`].
    pub fn models(&self) -> Result<Vec<Listed>> {
        let json = self.file(&Request::List)?;
        serde_json::from_slice(&json).map_err(|error| self.connection.gone(error.to_string()))
    }

    /// What the model that goes by `name` consists of.
    ///
    /// # Errors
    /// [`Error::AgentRefused`]; [`Error::NoAgent`].
    pub fn manifest(&self, name: &str) -> Result<Manifest> {
        let model = name.to_owned();
        Manifest::decode(&self.file(&Request::Show { model })?)
    }

    /// What the agent has.
    ///
    /// # Errors
    /// [`Error::AgentRefused`]; [`Error::NoAgent`].
    pub fn stats(&self) -> Result<AgentStats> {
        match self.ask(&Request::Stats)? {
            Reply::Stats(stats) => Ok(stats),
            reply => Err(self.connection.unexpected(&reply)),
        }
    }

    /// Lets the model that goes by `name` go by `label` as well. The label is this user's from then
    /// on: others cannot let it mean something else.
    ///
    /// # Errors
    /// [`Error::AgentRefused`]; [`Error::NoAgent`].
    pub fn set_label(&self, label: &str, name: &str) -> Result<()> {
        self.done(&Request::Label {
            label: label.to_owned(),
            model: name.to_owned(),
        })
    }

    /// Takes `label` away.
    ///
    /// # Errors
    /// [`Error::AgentRefused`]; [`Error::NoAgent`].
    pub fn remove_label(&self, label: &str) -> Result<()> {
        let label = label.to_owned();
        self.done(&Request::Unlabel { label })
    }

    /// Has the agent export a view, which only the owner of the stored files can, in a folder below
    /// the store's root that goes by this user's id and `view`.
    ///
    /// # Errors
    /// [`Error::AgentRefused`]; [`Error::NoAgent`].
    pub fn export_view(&self, name: &str, kind: ViewKind, view: &str) -> Result<View> {
        let request = Request::View {
            model: name.to_owned(),
            kind,
            name: view.to_owned(),
        };
        match self.ask(&request)? {
            Reply::Exported(view) => Ok(view),
            reply => Err(self.connection.unexpected(&reply)),
        }
    }

    /// Has the agent remove a view of this user's.
    ///
    /// # Errors
    /// [`Error::AgentRefused`]; [`Error::NoAgent`].
    pub fn remove_view(&self, view: &str) -> Result<()> {
        let name = view.to_owned();
        self.done(&Request::RemoveView { name })
    }

    /// Has the agent sweep now. For root and the agent's own user.
    ///
    /// # Errors
    /// [`Error::AgentRefused`]; [`Error::NoAgent`].
    pub fn reclaim(&self) -> Result<ReclaimReport> {
        match self.ask(&Request::Reclaim)? {
            Reply::Reclaimed(report) => Ok(report),
            reply => Err(self.connection.unexpected(&reply)),
        }
    }

    fn file(&self, request: &Request) -> Result<Vec<u8>> {
        match self.connection.ask(request, &[], None)? {
            (Reply::File, files) => self.read(files),
            (reply, _) => Err(self.connection.unexpected(&reply)),
        }
    }

    /// All of a memfd that came with a reply.
    fn read(&self, files: Vec<OwnedFd>) -> Result<Vec<u8>> {
        let file = files.into_iter().next();
        let file = file.ok_or_else(|| self.connection.gone("an answer without its file"))?;
        let mut bytes = Vec::new();
        let mut file = File::from(file);
        // The descriptor's position is shared with whoever sent it.
        std::io::Seek::rewind(&mut file)
            .and_then(|()| file.read_to_end(&mut bytes))
            .map_err(Error::io("read what was sent by", &self.connection.socket))?;
        Ok(bytes)
    }
}

/// The agent's store, if `root` is that very directory here as well.
fn the_same_store(root: &Path, identity: (u64, u64), domain: &Domain) -> Option<Store> {
    let metadata = fs::metadata(root).ok()?;
    if (metadata.dev(), metadata.ino()) != identity {
        return None;
    }
    let config = StoreConfig {
        domain: domain.clone(),
        ..StoreConfig::at(root)
    };
    match Store::open(config) {
        Ok(store) => Some(store),
        Err(error) => {
            tracing::debug!(%error, "taking leases through the agent");
            None
        }
    }
}

/// Stored files of a model that an agent lends, one by one as they are needed.
#[derive(Debug)]
struct Lent {
    connection: Arc<Connection>,
    model: ModelId,
}

impl Objects for Lent {
    fn open(&self, id: &ObjectId) -> Result<Option<File>> {
        let request = Request::Open {
            model: self.model,
            object: *id,
        };
        match self.connection.ask(&request, &[], None)? {
            (Reply::File, files) => Ok(files.into_iter().next().map(File::from)),
            (reply, _) => Err(self.connection.unexpected(&reply)),
        }
    }

    fn path(&self, _: &ObjectId) -> Option<PathBuf> {
        None
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        lock(&self.connection.detached).push(self.model);
        // Where a request is under way, before the next one; where it cannot be sent, by hanging up.
        if let Ok(channel) = self.connection.channel.try_lock()
            && let Some(channel) = &*channel
            && let Err(error) = self.connection.flush(channel, false)
        {
            tracing::debug!(%error, "a lease ends with the connection");
        }
    }
}
