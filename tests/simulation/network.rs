//! Network: that the simulated network behaves as the comments of `net::simulated` say, since all else rests on it.

use std::future::Future;
use std::io::ErrorKind;
use std::time::Duration;

use longhaul::net::simulated::{self, Link, Network, Passage, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, timeout};

use crate::shape::{PROXY, agent_address, agent_host};

/// In a world with nothing but a network, of which the proxy and the first agent are hosts.
fn with_network<F: Future<Output = ()>>(work: impl FnOnce(Network) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build_local(Default::default())
        .expect("a runtime");
    runtime.block_on(async {
        let network = Network::begin(1, PROXY);
        spawn_local(network.clone().drive());
        work(network).await;
    });
    drop(runtime);
    simulated::end();
}

/// Both ends of a connection from the proxy to the first agent.
async fn connected(network: &Network) -> (Stream, Stream) {
    let listener = network.bind(agent_address(0)).expect("free");
    let near = network.connect(agent_address(0)).await.expect("somebody listens");
    let (far, _) = listener.accept().await.expect("somebody has connected");
    (near, far)
}

fn link(passage: Passage) -> Link {
    Link { passage, ..Link::default() }
}

#[test]
fn what_is_sent_comes_whole_and_in_order_whatever_is_lost_on_the_way() {
    with_network(|network| async move {
        network.set_link(PROXY, agent_host(0), Link { loss: 0.3, ..Link::default() });
        let (mut near, mut far) = connected(&network).await;
        let sent: Vec<u8> = (0..200_000u32).map(|number| number as u8 ^ (number >> 8) as u8).collect();
        let expected = sent.clone();
        let sending = spawn_local(async move {
            near.write_all(&sent).await.expect("taken");
            near.shutdown().await.expect("ended");
            near
        });
        let mut received = Vec::new();
        far.read_to_end(&mut received).await.expect("an end");
        assert!(received == expected, "{} bytes came", received.len());
        drop(sending.await);
    });
}

#[test]
fn a_cut_link_keeps_everybody_waiting_and_a_reset_is_lost_on_it() {
    with_network(|network| async move {
        let (mut near, mut far) = connected(&network).await;
        network.set_link(PROXY, agent_host(0), link(Passage::Cut));
        near.write_all(b"late").await.expect("the system takes it");
        let mut buffer = [0; 4];
        assert!(timeout(Duration::from_secs(60), far.read_exact(&mut buffer)).await.is_err());
        network.set_link(PROXY, agent_host(0), Link::default());
        far.read_exact(&mut buffer).await.expect("it comes");
        assert_eq!(&buffer, b"late");

        network.set_link(PROXY, agent_host(0), link(Passage::Cut));
        near.reset_on_close();
        drop(near);
        sleep(Duration::from_secs(1)).await;
        network.set_link(PROXY, agent_host(0), Link::default());
        assert!(timeout(Duration::from_secs(60), far.read(&mut buffer)).await.is_err(), "nobody has told it");
        far.write_all(b"still there?").await.expect("the system takes it");
        let told = timeout(Duration::from_secs(1), far.read(&mut buffer)).await.expect("it is told");
        assert_eq!(told.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
        assert_eq!(far.read(&mut buffer).await.expect("told once"), 0);
    });
}

#[test]
fn a_host_without_power_is_silent_and_knows_nothing_when_it_is_back() {
    with_network(|network| async move {
        let (mut near, far) = connected(&network).await;
        network.cut_power(agent_host(0));
        drop(far);
        near.write_all(b"hello?").await.expect("the system takes it");
        let mut buffer = [0; 4];
        assert!(timeout(Duration::from_secs(60), near.read(&mut buffer)).await.is_err());
        assert!(timeout(Duration::from_secs(5), network.connect(agent_address(0))).await.is_err());
        network.restore_power(agent_host(0));
        let told = timeout(Duration::from_secs(5), near.read(&mut buffer)).await.expect("it is told");
        assert_eq!(told.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
        let refused = network.connect(agent_address(0)).await.expect_err("nobody listens");
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        drop(near);
        sleep(Duration::from_secs(10)).await;
        assert_eq!(network.open_connections(PROXY), 0);
    });
}

#[test]
fn unread_bytes_make_a_close_a_reset_and_read_ones_an_end() {
    with_network(|network| async move {
        for reads in [true, false] {
            let (mut near, mut far) = connected(&network).await;
            far.write_all(b"x").await.expect("taken");
            sleep(Duration::from_millis(10)).await;
            if reads {
                near.read_u8().await.expect("it has come");
            }
            drop(near);
            let end = far.read(&mut [0; 1]).await;
            assert_eq!(end.map_err(|error| error.kind()), if reads { Ok(0) } else { Err(ErrorKind::ConnectionReset) });
        }
    });
}

#[test]
fn a_side_that_does_not_read_holds_the_other_one_back() {
    with_network(|network| async move {
        let (mut near, mut far) = connected(&network).await;
        let began = Instant::now();
        let sending = spawn_local(async move {
            near.write_all(&[7; 100 * 1024]).await.expect("taken");
            (near, Instant::now())
        });
        sleep(Duration::from_secs(30)).await;
        assert!(!sending.is_finished());
        far.read_exact(&mut [0; 100 * 1024]).await.expect("it comes");
        let (_near, ended) = sending.await.expect("no panic");
        assert!(ended - began >= Duration::from_secs(30));
    });
}
