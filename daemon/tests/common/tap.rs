//! A tap on the control connections between two daemons, which can hold messages back: so a test
//! stops a migration at any point of the protocol, for as long as it likes.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use memlane_lab::HostId;
use memlane_net::config::CONTROL_PORT;
use memlane_protocol::wire::attach::MigrationId;
use memlane_protocol::wire::control::{Control, HEADER_BYTES, Offer, decode_header};
use memlane_protocol::wire::hello::{ANSWER_BYTES, Answer, HELLO_BYTES};

use super::{LONG, Stage};

/// Where host A finds host B, and host B host A: both on host B, at either end of the tap.
const PORTS: [u16; 2] = [7500, 7501];

pub(crate) struct Tap(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    closed: AtomicBool,
}

#[derive(Default)]
struct State {
    rule: Option<Rule>,
    /// Messages that are held back, and where they are to go.
    held: Vec<(Arc<TcpStream>, Vec<u8>)>,
    offer: Option<Offer>,
}

/// From the first message of `from` that it matches on, all of them are held; pings go on.
struct Rule {
    from: HostId,
    matches: Box<dyn Fn(&Control) -> bool + Send>,
    /// The migrations that were offered since the rule was made.
    offered: Vec<MigrationId>,
}

impl Rule {
    /// Tells whether this message is the first to be held. The last words of a migration before may be late, because
    /// they are said again until they are answered: they are not what the test waits for.
    fn begins_at(&self, message: &Control) -> bool {
        let late =
            matches!(message, Control::Handover { migration, .. } if !self.offered.contains(migration));
        !late && (self.matches)(message)
    }
}

/// Returns a configuration in which nothing is encrypted: a tap understands what it hears.
fn insecure(text: &str) -> String {
    const INSECURE: &str = "insecure = true\n";
    if text.starts_with(INSECURE) { text.to_owned() } else { INSECURE.to_owned() + text }
}

impl Tap {
    /// Puts a tap between the daemons and starts them anew. A daemon takes calls only from where
    /// it knows its peer, so each knows the other at the tap.
    pub(crate) fn install(stage: &mut Stage) -> Self {
        let shared = Arc::new(Shared::default());
        let [a, b] = [HostId::A, HostId::B].map(|id| stage.rig.lab().host(id).control_address());
        for (from, port, to) in [(HostId::A, PORTS[0], b), (HostId::B, PORTS[1], a)] {
            let (shared, to) = (shared.clone(), SocketAddr::new(IpAddr::V4(to), CONTROL_PORT));
            let serve = || {
                let listener = TcpListener::bind((b, port)).unwrap();
                listener.set_nonblocking(true).unwrap();
                // Inherits the namespace, as do the threads that it starts.
                std::thread::spawn(move || accept(&listener, from, to, &shared));
            };
            stage.rig.lab().host(HostId::B).run_in(serve).unwrap();
        }
        for (id, direct, tapped) in peers(stage) {
            stage.reconfigure(id, |text| insecure(&text.replace(&direct, &tapped)));
        }
        Self(shared)
    }

    /// Lets the daemons talk without a tap again; starts them anew.
    pub(crate) fn remove(self, stage: &mut Stage) {
        for (id, direct, tapped) in peers(stage) {
            stage.reconfigure(id, |text| text.replace(&tapped, &direct));
        }
    }

    /// Holds back what host `from` says, from the first message on that `matches`. A word of the handover counts only
    /// if its migration is offered after this call.
    pub(crate) fn hold(&self, from: HostId, matches: impl Fn(&Control) -> bool + Send + 'static) {
        self.0.lock().rule = Some(Rule { from, matches: Box::new(matches), offered: Vec::new() });
    }

    /// Waits until a message is held back.
    #[track_caller]
    pub(crate) fn wait(&self) {
        let waited = self.0.changed.wait_timeout_while(self.0.lock(), LONG, |state| state.held.is_empty());
        let (state, _) = waited.unwrap();
        assert!(!state.held.is_empty(), "nothing that is to be held back was said");
    }

    /// Lets go of what is held back, in its order, and of all that follows.
    pub(crate) fn release(&self) {
        let mut state = self.0.lock();
        state.rule = None;
        for (stream, bytes) in state.held.drain(..) {
            // Who should hear it may be gone.
            let _ = (&*stream).write_all(&bytes);
        }
        self.0.changed.notify_all();
    }

    /// Loses what is held back, and with it the connections that it was on, and lets pass all that follows.
    pub(crate) fn lose(&self) {
        let mut state = self.0.lock();
        state.rule = None;
        for (stream, _) in state.held.drain(..) {
            // The other half of the connection ends with it. A stream that loses some of what it carries does not go on.
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.0.changed.notify_all();
    }

    /// The last offer that passed.
    pub(crate) fn offer(&self) -> Option<Offer> {
        self.0.lock().offer.clone()
    }
}

/// Of each host how it knows its peer, directly and through the tap.
fn peers(stage: &Stage) -> [(HostId, String, String); 2] {
    let [a, b] = [HostId::A, HostId::B].map(|id| stage.rig.lab().host(id).control_address());
    [(HostId::A, b, PORTS[0]), (HostId::B, a, PORTS[1])]
        .map(|(id, peer, port)| (id, format!("control = \"{peer}\""), format!("control = \"{b}:{port}\"")))
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it has the lock")
    }

    fn pass(&self, from: HostId, message: &Control, bytes: Vec<u8>, to: &Arc<TcpStream>) -> io::Result<()> {
        let mut state = self.lock();
        if let Control::Offer(offer) = message {
            state.offer = Some(offer.clone());
            if let Some(rule) = &mut state.rule {
                rule.offered.push(offer.migration);
            }
        }
        let ping = matches!(message, Control::Ping(_) | Control::Pong(_));
        let rule = state.rule.as_ref().filter(|rule| rule.from == from && !ping);
        if rule.is_some_and(|rule| !state.held.is_empty() || rule.begins_at(message)) {
            state.held.push((to.clone(), bytes));
            self.changed.notify_all();
            return Ok(());
        }
        (&**to).write_all(&bytes)
    }
}

fn accept(listener: &TcpListener, from: HostId, to: SocketAddr, shared: &Arc<Shared>) {
    while !shared.closed.load(Ordering::Relaxed) {
        let Ok((caller, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        caller.set_nonblocking(false).unwrap();
        let shared = shared.clone();
        std::thread::spawn(move || {
            // A host that does not answer is no news to a caller whose connection ends.
            let Ok(called) = TcpStream::connect_timeout(&to, LONG) else { return };
            let _ = relay(caller, called, from, &shared);
        });
    }
}

fn relay(caller: TcpStream, called: TcpStream, from: HostId, shared: &Arc<Shared>) -> io::Result<()> {
    for stream in [&caller, &called] {
        stream.set_nodelay(true)?;
    }
    let (caller, called) = (Arc::new(caller), Arc::new(called));
    let back = if from == HostId::A { HostId::B } else { HostId::A };
    let opened = open(&caller, &called);
    if opened.is_ok() {
        std::thread::scope(|scope| {
            scope.spawn(|| forward(from, &caller, &called, shared));
            forward(back, &called, &caller, shared)
        })?;
    }
    hang_up(&caller, &called);
    opened
}

/// Passes on the greeting and its answer.
fn open(caller: &TcpStream, called: &TcpStream) -> io::Result<()> {
    (&*called).write_all(&read(caller, HELLO_BYTES)?)?;
    let mut answer = read(called, ANSWER_BYTES)?;
    let text = Answer::text_bytes(&answer).map_err(io::Error::other)?;
    answer.extend(read(called, text)?);
    (&*caller).write_all(&answer)
}

fn forward(from: HostId, source: &TcpStream, to: &Arc<TcpStream>, shared: &Shared) -> io::Result<()> {
    let one = || {
        let mut bytes = read(source, HEADER_BYTES)?;
        let (kind, length) = decode_header(&bytes).map_err(io::Error::other)?;
        let body = read(source, length)?;
        let message = Control::decode(kind, &body).map_err(io::Error::other)?;
        bytes.extend(body);
        shared.pass(from, &message, bytes, to)
    };
    let error = loop {
        if let Err(error) = one() {
            break error;
        }
    };
    // Last words that are held back are heard before the end.
    let state = shared.lock();
    let of_this = |state: &mut State| state.held.iter().any(|(held, _)| Arc::ptr_eq(held, to));
    drop(shared.changed.wait_timeout_while(state, LONG, of_this));
    hang_up(source, to);
    Err(error)
}

fn read(mut stream: &TcpStream, count: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn hang_up(one: &TcpStream, other: &TcpStream) {
    for stream in [one, other] {
        // Fails where it is done already.
        let _ = stream.shutdown(Shutdown::Both);
    }
}
