//! The agent as its clients see it: leases, users, hostile ones, restarts.
#![cfg(feature = "daemon")]
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(clippy::panic, reason = "the same")]

mod common;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{self, Role};
use carlsbad_types::ByteSize;
use common::{random_bytes, scratch};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use tempfile::TempDir;
use tetris_store::agent::{Access, Agent, AgentConfig, Client, ClientConfig, Refusal};
use tetris_store::{Domain, Error, IngestOptions, ModelId, Store, StoreConfig, ViewKind};

/// A store with a fast agent.
struct Machine {
    dir: TempDir,
    config: AgentConfig,
    agent: Option<Agent>,
}

impl Machine {
    fn new(change: impl FnOnce(&mut AgentConfig)) -> Self {
        let dir = scratch();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let store = StoreConfig {
            keep_alive: Duration::from_millis(300),
            ..StoreConfig::at(dir.path().join("store"))
        };
        let mut config = AgentConfig::new(dir.path().join("socket"), store);
        config.sweep_every = Duration::from_millis(50);
        config.limits.patience = Duration::from_millis(500);
        change(&mut config);
        let agent = Some(Agent::start(config.clone()).unwrap());
        Self { dir, config, agent }
    }

    fn client(&self) -> Client {
        Client::connect(self.client_config()).unwrap()
    }

    /// Leases through the connection, although the store is here.
    fn client_config(&self) -> ClientConfig {
        ClientConfig {
            own_leases: false,
            ..ClientConfig::at(&self.config.socket)
        }
    }

    fn store(&self) -> Store {
        Store::open(self.config.domains[0].store.clone()).unwrap()
    }

    fn has(&self, model: &ModelId) -> bool {
        self.store().manifest(model).is_ok()
    }

    /// Writes a model of `tensors` tensors of 100 kB.
    fn model(&self, name: &str, tensors: usize, seed: u64) -> PathBuf {
        let path = self.dir.path().join(name);
        write_model(&path, tensors, seed);
        path
    }

    fn wait_until_freed(&self, model: &ModelId) {
        let start = Instant::now();
        while self.has(model) {
            assert!(start.elapsed() < Duration::from_secs(20), "never freed");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn restart(&mut self) {
        self.agent = None;
        self.agent = Some(Agent::start(self.config.clone()).unwrap());
    }
}

fn write_model(path: &Path, tensors: usize, seed: u64) {
    let bytes: Vec<_> = (0..tensors)
        .map(|i| random_bytes(100_000, seed + i as u64))
        .collect();
    let views = bytes.iter().enumerate().map(|(i, bytes)| {
        let view = TensorView::new(Dtype::U8, vec![bytes.len()], bytes).unwrap();
        (format!("t{i}"), view)
    });
    serialize_to_file(views, None, path).unwrap();
    // Whatever the umask: another user is to read it.
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
}

fn refusal(error: &Error) -> Refusal {
    match error {
        Error::AgentRefused { kind, .. } => *kind,
        other => panic!("not a refusal: {other}"),
    }
}

#[test]
fn a_client_without_the_store_ingests_and_attaches_and_its_lease_ends_with_it() {
    let machine = Machine::new(|_| {});
    let path = machine.model("a.safetensors", 3, 1);
    let client = machine.client();
    let progress = |_| {};
    let options = IngestOptions {
        label: Some("base"),
        progress: Some(&progress),
    };
    let first = client.ingest(&path, &options).unwrap();
    assert_eq!(first.tensors, 3);
    assert_eq!(first.written, ByteSize::new(300_000));
    let again = client.ingest(&path, &options).unwrap();
    assert_eq!((again.model, again.written), (first.model, ByteSize::ZERO));

    let shared = client.attach("base").unwrap();
    for i in 0..3 {
        let tensor = shared.tensor(&format!("t{i}")).unwrap();
        assert!(tensor.bytes == random_bytes(100_000, 1 + i));
    }
    let other = machine.client();
    assert_eq!(other.models().unwrap()[0].labels, ["base"]);
    assert_eq!(other.manifest("base").unwrap().tensors.len(), 3);
    assert_eq!(other.stats().unwrap().clients, 2);

    thread::sleep(Duration::from_millis(800));
    assert!(machine.has(&first.model), "freed while leased");
    // The connection goes on; only the lease is given back.
    drop(shared);
    machine.wait_until_freed(&first.model);
    assert_eq!(
        refusal(&client.attach("base").unwrap_err()),
        Refusal::Unknown
    );
}

#[test]
fn two_attaches_of_one_connection_are_two_leases() {
    let machine = Machine::new(|_| {});
    let path = machine.model("a.safetensors", 1, 5);
    let client = machine.client();
    let id = client
        .ingest(&path, &IngestOptions::default())
        .unwrap()
        .model;
    let one = client.attach(&id.to_string()).unwrap();
    let two = client.attach(&id.to_string()).unwrap();
    drop(one);
    thread::sleep(Duration::from_millis(800));
    assert!(machine.has(&id), "freed while leased");
    assert_eq!(two.tensor("t0").unwrap().bytes.len(), 100_000);
    drop(client);
    // The model keeps its connection.
    thread::sleep(Duration::from_millis(500));
    assert!(machine.has(&id), "freed while leased");
    drop(two);
    machine.wait_until_freed(&id);
}

#[test]
fn models_of_several_files_are_passed_as_files() {
    let machine = Machine::new(|_| {});
    let folder = machine.dir.path().join("model");
    fs::create_dir(&folder).unwrap();
    let mut map = HashMap::new();
    for shard in 0..150 {
        let name = format!("shard-{shard}.safetensors");
        let bytes = random_bytes(1_000, shard);
        let view = TensorView::new(Dtype::U8, vec![1_000], &bytes).unwrap();
        serialize_to_file([(format!("t{shard}"), view)], None, &folder.join(&name)).unwrap();
        map.insert(format!("t{shard}"), name);
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    fs::write(
        folder.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    let client = machine.client();
    let ingested = client.ingest(&folder, &IngestOptions::default()).unwrap();
    assert_eq!(ingested.tensors, 150);
    let direct = machine
        .store()
        .ingest(&*tetris_store::open_model(&folder).unwrap())
        .unwrap();
    assert_eq!(
        direct.model, ingested.model,
        "not the same model as from the folder"
    );
}

#[test]
#[ignore = "a role of `a_killed_clients_lease_ends_at_once`"]
fn role_holder() {
    let Some((socket, model)) = child::arguments::<(PathBuf, String)>("role_holder") else {
        return;
    };
    let client = Client::connect(ClientConfig {
        own_leases: false,
        ..ClientConfig::at(socket)
    })
    .unwrap();
    let shared = client.attach(&model).unwrap();
    assert_eq!(shared.tensor("t0").unwrap().bytes.len(), 100_000);
    child::tell("holding");
    thread::sleep(Duration::from_secs(600));
}

#[test]
fn a_killed_clients_lease_ends_at_once() {
    let machine = Machine::new(|_| {});
    let path = machine.model("a.safetensors", 1, 9);
    let id = machine
        .client()
        .ingest(&path, &IngestOptions::default())
        .unwrap()
        .model;
    let arguments = (&machine.config.socket, id.to_string());
    let mut holder = Role::test("role_holder").start(&arguments).unwrap();
    holder.hear("holding").unwrap();
    thread::sleep(Duration::from_millis(700));
    assert!(machine.has(&id), "freed while leased");
    holder.kill();
    let killed = Instant::now();
    machine.wait_until_freed(&id);
    assert!(
        killed.elapsed() >= Duration::from_millis(290),
        "freed early"
    );
}

/// A connection that is not a client's.
fn raw(machine: &Machine) -> OwnedFd {
    let end = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    connect(
        end.as_raw_fd(),
        &UnixAddr::new(&machine.config.socket).unwrap(),
    )
    .unwrap();
    end
}

fn send_raw(end: &OwnedFd, bytes: &[u8], files: &[i32]) -> nix::Result<usize> {
    let rights = [ControlMessage::ScmRights(files)];
    let rights = if files.is_empty() { &[][..] } else { &rights };
    let parts = [IoSlice::new(bytes)];
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(end.as_raw_fd(), &parts, rights, flags, None)
}

fn threads_called(name: &str) -> usize {
    fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|comm| comm.trim() == name)
        .count()
}

#[test]
fn hostile_clients_do_no_harm() {
    let machine = Machine::new(|config| config.limits.clients_per_user = 40);
    let path = machine.model("a.safetensors", 1, 11);
    let good = machine.client();
    let id = good.ingest(&path, &IngestOptions::default()).unwrap().model;
    let _lease = good.attach(&id.to_string()).unwrap();

    let file = File::open("/proc/self/exe").unwrap();
    let many = vec![file.as_raw_fd(); 253];
    let hello = br#"tetris1
{"hello":{"domain":""}}"#;
    let deep = [&b"tetris1\n"[..], "[".repeat(60_000).as_bytes()].concat();
    let long_name = format!(
        "tetris1\n{{\"attach\":{{\"model\":\"{}\"}}}}",
        "../".repeat(15_000)
    );
    let files = format!(
        "tetris1\n{{\"files\":{{\"names\":{}}}}}",
        serde_json::to_string(&vec!["x"; 128]).unwrap()
    );
    let mut held = Vec::new();
    for round in 0..30 {
        let end = raw(&machine);
        // Each sends what it can; most are hung up on meanwhile.
        match round % 6 {
            0 => drop(send_raw(&end, b"\0\xff garbage", &many)),
            1 => drop(send_raw(&end, &deep, &[])),
            2 => {
                let _ = send_raw(&end, hello, &[]);
                let _ = send_raw(&end, long_name.as_bytes(), &[]);
                for _ in 0..200 {
                    let _ = send_raw(
                        &end,
                        br#"tetris1
"list""#,
                        &[],
                    );
                }
            }
            3 => {
                let _ = send_raw(&end, hello, &[]);
                for _ in 0..20 {
                    let _ = send_raw(&end, files.as_bytes(), &many[..128]);
                }
            }
            4 => drop(send_raw(&end, &files.as_bytes()[..40], &many)),
            // Says nothing at all.
            _ => {}
        }
        held.push(end);
        assert!(good.models().is_ok());
    }
    // Too many of them: a clear answer.
    let crowd: Vec<_> = (0..60).map(|_| raw(&machine)).collect();
    let refused = (0..60).find_map(|_| Client::connect(machine.client_config()).err());
    assert!(
        matches!(
            &refused,
            Some(Error::AgentRefused {
                kind: Refusal::TooMany,
                ..
            })
        ),
        "{refused:?}"
    );
    drop(crowd);

    // Whoever is silent, or does not take in replies, is hung up on; the files are closed.
    let start = Instant::now();
    while good.stats().unwrap().clients > 1 {
        let left = good.stats().unwrap().clients;
        // Some of the above said hello properly, and may be silent until the idle time is over.
        if start.elapsed() > Duration::from_secs(5) {
            drop(held);
            thread::sleep(Duration::from_secs(1));
            assert!(good.stats().unwrap().clients <= 1, "{left} clients stay");
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert!(good.attach(&id.to_string()).is_ok());
}

#[test]
fn files_that_could_hang_the_agent_are_refused() {
    let machine = Machine::new(|_| {});
    let fifo = machine.dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let client = machine.client();
    let start = Instant::now();
    assert!(client.ingest(&fifo, &IngestOptions::default()).is_err());
    assert!(
        client
            .ingest(Path::new("/dev/zero"), &IngestOptions::default())
            .is_err()
    );

    // Passed on in spite of the client library.
    let end = raw(&machine);
    let opened = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&fifo)
        .unwrap();
    send_raw(&end, b"tetris1\n{\"hello\":{\"domain\":\"\"}}", &[]).unwrap();
    let files = b"tetris1\n{\"files\":{\"names\":[\"x\"]}}";
    send_raw(&end, files, &[opened.as_raw_fd()]).unwrap();
    send_raw(
        &end,
        b"tetris1\n{\"ingest\":{\"label\":null,\"main\":\"x\"}}",
        &[],
    )
    .unwrap();
    assert!(client.models().unwrap().is_empty());
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_dead_agents_socket_is_taken_over_and_a_living_ones_is_not() {
    let mut machine = Machine::new(|_| {});
    let again = Agent::start(machine.config.clone()).unwrap_err();
    assert!(matches!(again, Error::AgentRunning { .. }), "{again}");
    let other_socket = AgentConfig {
        socket: machine.dir.path().join("other"),
        ..machine.config.clone()
    };
    let again = Agent::start(other_socket).unwrap_err();
    assert!(matches!(again, Error::AgentRunning { .. }), "{again}");

    machine.agent = None;
    assert!(!machine.config.socket.exists());
    let gone = Client::connect(machine.client_config()).unwrap_err();
    assert!(matches!(gone, Error::NoAgent { .. }), "{gone}");
    // What a killed one leaves behind.
    let left = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let address = UnixAddr::new(&machine.config.socket).unwrap();
    nix::sys::socket::bind(left.as_raw_fd(), &address).unwrap();
    drop(left);
    machine.restart();
    assert!(machine.client().models().unwrap().is_empty());
}

#[test]
fn a_stopped_agent_hangs_up_and_a_lease_of_ones_own_outlives_it() {
    let mut machine = Machine::new(|_| {});
    let path = machine.model("a.safetensors", 1, 21);
    let with_store = Client::connect(ClientConfig::at(&machine.config.socket)).unwrap();
    let id = with_store
        .ingest(&path, &IngestOptions::default())
        .unwrap()
        .model;
    let own = with_store.attach(&id.to_string()).unwrap();
    let client = machine.client();
    let lent = client.attach(&id.to_string()).unwrap();
    assert_eq!(lent.tensor("t0").unwrap().bytes.len(), 100_000);

    let start = Instant::now();
    machine.restart();
    assert!(start.elapsed() < Duration::from_secs(5), "slow to stop");
    let gone = client.models().unwrap_err();
    assert!(matches!(gone, Error::NoAgent { .. }), "{gone}");
    // What is mapped stays, and giving it back to nobody is no error.
    assert!(lent.tensor("t0").unwrap().bytes == random_bytes(100_000, 21));
    drop(lent);
    thread::sleep(Duration::from_millis(800));
    assert!(machine.has(&id), "freed while leased");
    drop(own);
    machine.wait_until_freed(&id);
}

#[test]
fn threads_end_with_the_agent() {
    let machine = Machine::new(|_| {});
    let clients: Vec<_> = (0..10).map(|_| machine.client()).collect();
    drop(machine);
    drop(clients);
    let start = Instant::now();
    // Other tests of this process run agents of their own: theirs end, too.
    while threads_called("tetris-client") + threads_called("tetris-sweep") > 0 {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "threads are left"
        );
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "a role of `a_view_is_charged_for_what_it_keeps_and_what_it_copies`"]
fn role_viewer() {
    let Some((socket, own)) = child::arguments::<(PathBuf, PathBuf)>("role_viewer") else {
        return;
    };
    let client = Client::connect(ClientConfig::at(&socket)).unwrap();
    let yours = || client.stats().unwrap().yours.get();
    let export = |model: &str, name| client.export_view(model, ViewKind::HfSharded, name);
    // Another's model is charged from the moment that a view of one's own keeps it.
    let view = export("base", "one").unwrap();
    let one = yours();
    assert!((200_000..230_000).contains(&one), "{one}");
    // The same stored files a second time: only what the second view has for itself.
    export("base", "two").unwrap();
    assert!(yours() - one < 10_000, "{}", yours());
    client.remove_view("two").unwrap();
    assert_eq!(yours(), one);
    // What was brought as well is not charged twice.
    client.ingest(&own, &IngestOptions::default()).unwrap();
    assert!(yours() < 230_000, "{}", yours());
    // Beyond the quota: refused before a byte of it is there.
    for name in ["large", "renamed"] {
        let refused = export(name, "three").unwrap_err();
        assert_eq!(refusal(&refused), Refusal::NoRoom, "{refused}");
        assert!(!view.path.with_file_name("three").exists());
    }
    assert!(yours() < 230_000, "{}", yours());
    child::tell("viewing");
    child::wait_for_parent();
    // The model has been reclaimed; what the view keeps is still paid for.
    assert!(refusal(&client.attach("base").unwrap_err()) == Refusal::Unknown);
    assert!(yours() >= 200_000, "{}", yours());
    let refused = export("large", "three").unwrap_err();
    assert_eq!(refusal(&refused), Refusal::NoRoom, "{refused}");
    client.remove_view("one").unwrap();
    assert_eq!(yours(), 0);
    let large = export("large", "three").unwrap();
    assert_eq!(large.linked, ByteSize::new(300_000));
    child::tell("done");
}

#[test]
fn a_view_is_charged_for_what_it_keeps_and_what_it_copies() {
    carlsbad_kit::require!(Capability::Root);
    let machine = Machine::new(|config| {
        config.domains[0].quota_per_user = Some(ByteSize::new(420_000));
    });
    let root = machine.client();
    let labelled = |label| IngestOptions {
        label: Some(label),
        progress: None,
    };
    let base = machine.model("base.safetensors", 2, 71);
    let id = root.ingest(&base, &labelled("base")).unwrap().model;
    let held = root.attach("base").unwrap();
    root.ingest(
        &machine.model("large.safetensors", 3, 81),
        &labelled("large"),
    )
    .unwrap();
    let _large = root.attach("large").unwrap();
    // The tensors of `large` under other names: its view has to copy them.
    let bytes: Vec<_> = (0..3).map(|i| random_bytes(100_000, 81 + i)).collect();
    let views = bytes.iter().enumerate().map(|(i, bytes)| {
        let view = TensorView::new(Dtype::U8, vec![bytes.len()], bytes).unwrap();
        (format!("other{i}"), view)
    });
    let renamed = machine.dir.path().join("renamed.safetensors");
    serialize_to_file(views, None, &renamed).unwrap();
    root.ingest(&renamed, &labelled("renamed")).unwrap();
    let _renamed = root.attach("renamed").unwrap();

    let arguments = (&machine.config.socket, &base);
    let mut viewer = as_nobody("role_viewer").start(&arguments).unwrap();
    viewer.hear("viewing").unwrap();
    drop(held);
    machine.wait_until_freed(&id);
    viewer.say("go on").unwrap();
    viewer.hear("done").unwrap();
    assert!(viewer.wait().unwrap().success());
}

/// A role of this binary as user `nobody`.
fn as_nobody(role: &str) -> Role {
    let arguments = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    Role::test(role).by("setpriv", &arguments)
}

#[test]
#[ignore = "a role of `users_have_quotas_labels_and_views_of_their_own`"]
fn role_user() {
    let Some((socket, models, base)) =
        child::arguments::<(PathBuf, Vec<PathBuf>, String)>("role_user")
    else {
        return;
    };
    let plain = IngestOptions::default();
    let labelled = |label| IngestOptions {
        label: Some(label),
        ..plain
    };
    let client = Client::connect(ClientConfig::at(&socket)).unwrap();
    // Not his: neither sweeps nor others' labels.
    assert_eq!(refusal(&client.reclaim().unwrap_err()), Refusal::NotAllowed);
    let taken = client.ingest(&models[0], &labelled("base")).unwrap_err();
    assert_eq!(refusal(&taken), Refusal::NotAllowed);
    assert_eq!(
        refusal(&client.remove_label("base").unwrap_err()),
        Refusal::NotAllowed
    );
    // His own: as much as the quota allows, duplicates of others' models included.
    let mine = client.ingest(&models[0], &labelled("mine")).unwrap();
    let attached = client.attach("mine").unwrap();
    assert_eq!(attached.id(), &mine.model);
    assert_eq!(client.stats().unwrap().yours, ByteSize::new(200_000));
    let too_much = client.ingest(&models[1], &plain).unwrap_err();
    assert_eq!(refusal(&too_much), Refusal::NoRoom, "{too_much}");
    // A view, which he could not link himself; its files are there.
    let view = client
        .export_view("mine", ViewKind::HfSharded, "one")
        .unwrap();
    assert!(view.path.join("model.safetensors.index.json").exists());
    let again = client
        .export_view(&base, ViewKind::HfSharded, "two")
        .unwrap_err();
    assert_eq!(refusal(&again), Refusal::TooMany);
    let outside = client
        .export_view("mine", ViewKind::HfSharded, "../../x")
        .unwrap_err();
    assert_eq!(refusal(&outside), Refusal::Failed);
    assert_eq!(
        refusal(&client.remove_view("..").unwrap_err()),
        Refusal::Failed
    );
    client.remove_view("one").unwrap();
    assert!(!view.path.exists());
    // A domain that he may not use looks like none.
    let secret = ClientConfig {
        domain: Domain::new("secret"),
        ..ClientConfig::at(&socket)
    };
    let unknown = Client::connect(secret).unwrap_err();
    assert_eq!(refusal(&unknown), Refusal::UnknownDomain);
    // Files he may not read he cannot have read for him.
    let hidden = client.ingest(&models[2], &plain).unwrap_err();
    assert!(matches!(hidden, Error::Io { .. }), "{hidden}");
    client.set_label("mine-too", "mine").unwrap();
    child::tell("done");
    child::wait_for_parent();
    drop(attached);
}

#[test]
fn users_have_quotas_labels_and_views_of_their_own() {
    carlsbad_kit::require!(Capability::Root);
    let mut machine = Machine::new(|config| {
        config.domains[0].quota_per_user = Some(ByteSize::new(250_000));
        config.limits.views_per_user = 1;
        let mut secret = config.domains[0].clone();
        secret.store.root = secret.store.root.with_file_name("secret");
        secret.store.domain = Domain::new("secret");
        secret.access = Access::Only {
            users: vec![4242],
            groups: vec![],
        };
        config.domains.push(secret);
    });
    let models = [
        machine.model("a.safetensors", 2, 31),
        machine.model("b.safetensors", 2, 41),
        machine.model("c.safetensors", 1, 51),
    ];
    fs::set_permissions(&models[2], fs::Permissions::from_mode(0o600)).unwrap();
    let root = machine.client();
    let base = IngestOptions {
        label: Some("base"),
        progress: None,
    };
    root.ingest(&models[0], &base).unwrap();
    let _held = root.attach("base").unwrap();
    let arguments = (&machine.config.socket, &models, "base");
    let mut user = as_nobody("role_user").start(&arguments).unwrap();
    user.hear("done").unwrap();

    // A new agent knows whose label that is, and what he has brought.
    drop(root);
    machine.restart();
    let mut again = as_nobody("role_label_owner")
        .start(&machine.config.socket)
        .unwrap();
    again.hear("done").unwrap();
    assert!(again.wait().unwrap().success());
    user.say("end").unwrap();
    assert!(user.wait().unwrap().success());
}

#[test]
#[ignore = "a role of `users_have_quotas_labels_and_views_of_their_own`"]
fn role_label_owner() {
    let Some(socket) = child::arguments::<PathBuf>("role_label_owner") else {
        return;
    };
    let client = Client::connect(ClientConfig::at(&socket)).unwrap();
    assert_eq!(client.stats().unwrap().yours, ByteSize::new(200_000));
    client.remove_label("mine-too").unwrap();
    assert_eq!(
        refusal(&client.remove_label("base").unwrap_err()),
        Refusal::NotAllowed
    );
    child::tell("done");
}

#[test]
#[ignore = "a role of `short_leases_of_those_who_cannot_stamp_count_as_use`"]
fn role_passer_by() {
    let Some((root, model)) = child::arguments::<(PathBuf, String)>("role_passer_by") else {
        return;
    };
    let store = Store::open(StoreConfig::at(root)).unwrap();
    drop(store.attach(&model.parse().unwrap()).unwrap());
    child::tell("done");
}

#[test]
fn short_leases_of_those_who_cannot_stamp_count_as_use() {
    carlsbad_kit::require!(Capability::Root);
    let keep_alive = Duration::from_secs(3);
    let machine = Machine::new(|config| {
        config.domains[0].store.keep_alive = keep_alive;
        // Only when asked to: no sweep sees the lease.
        config.sweep_every = Duration::from_secs(3600);
    });
    let path = machine.model("a.safetensors", 1, 61);
    let client = machine.client();
    let id = client
        .ingest(&path, &IngestOptions::default())
        .unwrap()
        .model;
    client.reclaim().unwrap();
    thread::sleep(keep_alive - Duration::from_millis(500));
    let root = machine.store().root().to_owned();
    let passer_by = as_nobody("role_passer_by")
        .start(&(root, id.to_string()))
        .unwrap();
    passer_by.hear("done").unwrap();
    let used = Instant::now();
    thread::sleep(Duration::from_millis(1_000));
    // Looking at it, as often as one likes, is no use.
    machine.store().models().unwrap();
    client.reclaim().unwrap();
    assert!(machine.has(&id), "reclaimed early");
    thread::sleep((keep_alive + Duration::from_millis(200)).saturating_sub(used.elapsed()));
    machine.store().models().unwrap();
    client.reclaim().unwrap();
    assert!(!machine.has(&id), "looking at it kept it");
}
