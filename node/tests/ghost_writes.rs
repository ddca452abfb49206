//! Ghost writes: a command that its host has given up and repeated elsewhere never takes effect afterwards, wherever
//! it waited meanwhile. `WEFT_STOPPED_SECONDS` makes it wait for longer than it takes to repeat and overwrite it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::mpsc;
use std::task::Poll;
use std::thread;
use std::time::Duration;

use common::{
    HOSTNQN, chunk_start, cluster, connect, expect_chunk, folder, on_host, owner, pattern, volume,
    wait_until_served, write_chunk,
};
use weft_block::{BlockDevice as _, Durability};
use weft_initiator::{ConnectOptions, Controller, HostIdentity};
use weft_node::local_cluster::Agents;
use weft_proto::id::HostId;
use weft_proto::nqn::Nqn;

/// What each test writes, in commands.
const CHUNKS: u64 = 48;

/// One path of the host, in a thread of its own: it writes when told to, says so when its next Keep Alive has been sent as
/// well, and is then deaf and mute until it is told to end. Its connections stay open meanwhile, as they do when the
/// network loses a host's farewell.
struct LostPath {
    go: mpsc::Sender<()>,
    sent: mpsc::Receiver<()>,
    thread: thread::JoinHandle<()>,
}

impl LostPath {
    /// Connects, and will write `round` into the first block of each chunk.
    fn connect(address: SocketAddr, subnqn: &Nqn, round: u64) -> Self {
        let (go, told) = mpsc::channel();
        let (say, sent) = mpsc::channel();
        let host = HostIdentity {
            hostnqn: HOSTNQN.parse().unwrap(),
            hostid: HostId([0x7e; 16]),
        };
        let options = ConnectOptions::new(address, subnqn.clone(), host);
        let thread = thread::spawn(move || {
            on_host(async {
                let kato = options.kato;
                let controller = Controller::connect(options).await.unwrap();
                let path = controller.namespace(1).await.unwrap();
                say.send(()).unwrap();
                told.recv().unwrap();
                let mut writes: Vec<_> = (0..CHUNKS)
                    .map(|chunk| {
                        let block = pattern(chunk, round).slice(..4096);
                        path.write(chunk_start(chunk), vec![block], Durability::Cached)
                    })
                    .collect();
                let answered = poll_fn(|cx| {
                    let answered = writes.iter_mut().any(|write| Pin::new(write).poll(cx).is_ready());
                    if answered { Poll::Ready(()) } else { Poll::Pending }
                });
                let sent = tokio::time::timeout(kato * 6 / 10, answered).await;
                assert!(sent.is_err(), "nobody was there to answer");
                say.send(()).unwrap();
                told.recv().unwrap();
            });
        });
        let path = Self { go, sent, thread };
        path.wait();
        path
    }

    fn wait(&self) {
        self.sent.recv_timeout(Duration::from_secs(30)).unwrap();
    }

    fn write(&self) {
        self.go.send(()).unwrap();
        self.wait();
    }

    fn end(self) {
        self.go.send(()).unwrap();
        self.thread.join().unwrap();
    }
}

/// Stops an agent with writes in its sockets, repeats and overwrites them on other paths, resumes it, and looks.
fn writes_left_in_a_socket_never_land(victim: impl Fn(&Agents) -> usize) {
    let seconds = std::env::var("WEFT_STOPPED_SECONDS").map_or(0, |text| text.parse().unwrap());
    let longer = Duration::from_secs(seconds);
    let folder = folder();
    let agents = cluster(folder.path(), 7, 256);
    let subnqn = volume(&agents, "v", "64MiB");
    on_host(async {
        let device = connect(&agents, &subnqn).await;
        for chunk in 0..CHUNKS {
            write_chunk(&device, chunk, 1).await.unwrap();
        }
        for round in [2, 5] {
            let stopped = victim(&agents);
            let path = LostPath::connect(agents.list[stopped].config.nvme_listen, &subnqn, round);
            agents.signal(stopped, "STOP").unwrap();
            path.write();
            // What has no answer is given up after the keep-alive timeout, and then repeated here.
            tokio::time::sleep(Duration::from_secs(1)).await;
            for chunk in 0..CHUNKS {
                write_chunk(&device, chunk, round + 1).await.unwrap();
            }
            for chunk in 0..CHUNKS {
                write_chunk(&device, chunk, round + 2).await.unwrap();
            }
            tokio::time::sleep(longer).await;
            agents.signal(stopped, "CONT").unwrap();
            for _ in 0..20 {
                for chunk in 0..CHUNKS {
                    expect_chunk(&device, chunk, round + 2).await;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            path.end();
            agents.wait_for_drives(7).unwrap();
            wait_until_served(&agents, "v");
        }
    });
}

#[test]
fn what_lay_in_the_sockets_of_a_stopped_owner_never_lands() {
    writes_left_in_a_socket_never_land(|agents| owner(agents, "v"));
}

#[test]
fn what_lay_in_the_sockets_of_a_stopped_forwarder_never_lands() {
    writes_left_in_a_socket_never_land(|agents| (owner(agents, "v") + 1) % agents.list.len());
}
