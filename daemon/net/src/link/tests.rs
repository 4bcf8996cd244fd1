use std::net::SocketAddr;

use tokio_uring::net::TcpListener;

use super::*;

const SILENCE: Duration = Duration::from_millis(500);

/// Makes both ends of a link.
pub(crate) async fn pair() -> (Link, Link) {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = listener.local_addr().unwrap();
    let (here, there) = tokio::join!(TcpStream::connect(address), listener.accept());
    (
        Link::over(Channel::plain(here.unwrap().into()), VERSIONS.1, SILENCE),
        Link::over(Channel::plain(there.unwrap().0.into()), VERSIONS.1, SILENCE),
    )
}

#[test]
fn a_side_that_is_behind_with_messages_is_not_silent_and_hears_no_silence() {
    tokio_uring::start(async {
        let (here, mut there) = pair().await;
        for round in 0..100 {
            here.send(&Control::Iteration { number: round, pages: 1 }).await.unwrap();
        }
        // Much longer than either may be silent.
        tokio::time::sleep(4 * SILENCE).await;
        for expected in 0..100 {
            let message = there.receive().await.unwrap();
            assert!(
                matches!(message, Control::Iteration { number: round, .. } if round == expected),
                "{message:?}"
            );
        }
        there.send(&Control::HolesDone).await.unwrap();
        let mut here = here;
        assert!(matches!(here.receive().await, Ok(Control::HolesDone)));
        assert!(here.sender.round_trip().is_some_and(|round_trip| round_trip < SILENCE));
    });
}

#[test]
fn what_is_read_ahead_is_bounded_and_nothing_is_lost() {
    const CHUNK: usize = 256 << 10;
    // More than is read ahead, and than the kernel holds for a connection.
    let chunks = 6 * traffic::READ_AHEAD_BYTES / CHUNK;
    tokio_uring::start(async {
        let (here, mut there) = pair().await;
        let sending = task::spawn("sender", async move {
            for offset in 0..chunks as u64 {
                let bytes = vec![offset as u8; CHUNK];
                here.send(&Control::State { total: 64 << 20, offset, bytes }).await.unwrap();
            }
            here
        });
        tokio::time::sleep(4 * SILENCE).await;
        assert!(!sending.is_finished(), "all was read, and nobody has dealt with it");
        for expected in 0..chunks as u64 {
            match there.receive().await.unwrap() {
                Control::State { offset, bytes, .. } => {
                    assert_eq!((offset, bytes.len(), bytes[0]), (expected, CHUNK, expected as u8));
                }
                other => panic!("{other:?}"),
            }
        }
        drop(sending.await.unwrap());
        assert!(matches!(there.receive().await, Err(LinkError::Closed | LinkError::Io(_))));
    });
}

#[test]
fn a_side_that_says_nothing_is_silent() {
    tokio_uring::start(async {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let (here, there) = tokio::join!(TcpStream::connect(address), listener.accept());
        let mut here = Link::over(Channel::plain(here.unwrap().into()), VERSIONS.1, SILENCE);
        let since = std::time::Instant::now();
        assert!(matches!(here.receive().await, Err(LinkError::Silent(_))));
        assert!((SILENCE..4 * SILENCE).contains(&since.elapsed()), "{:?}", since.elapsed());
        drop(there);
    });
}
