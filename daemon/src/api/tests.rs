//! Server and client against a backend that is told what to answer.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use async_trait::async_trait;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::LocalSet;

use super::access::Access;
use super::{Backend, Caller, Role, routes, server};
use memlane_api::client::{Client, ClientError};
use memlane_api::types::*;

struct Fake {
    migration: watch::Sender<Migration>,
    orders: RefCell<Vec<Order>>,
}

impl Fake {
    fn known(&self, id: &str) -> Result<(), ApiError> {
        match id {
            "00ff" => Ok(()),
            _ => Err(ApiError::new(ErrorCode::UnknownMigration, format!("no migration {id}"))),
        }
    }
}

#[async_trait(?Send)]
impl Backend for Fake {
    async fn status(&self) -> Status {
        Status { host: "host-a".to_owned(), insecure: true, ..Status::default() }
    }
    async fn ports(&self) -> Vec<PortInfo> {
        vec![PortInfo { name: "a".to_owned(), ..PortInfo::default() }]
    }
    fn peers(&self) -> Vec<PeerInfo> {
        vec![PeerInfo { name: "host-b".to_owned(), control: "10.0.0.2:7410".to_owned() }]
    }
    fn guests(&self) -> Vec<GuestInfo> {
        Vec::new()
    }
    async fn launch(&self, _: Caller, launch: Launch) -> Result<GuestInfo, ApiError> {
        match launch.definition.as_str() {
            "" => Err(ApiError::new(ErrorCode::CannotLaunch, "there is no QEMU")),
            name => Ok(guest(name, launch.incoming)),
        }
    }
    async fn attach(&self, _: Caller, attach: Attach) -> Result<GuestInfo, ApiError> {
        match attach.qmp.as_str() {
            "/none" => Err(ApiError::new(ErrorCode::CannotAttach, "nobody listens")),
            _ => Ok(guest(&attach.name, attach.incoming)),
        }
    }
    async fn detach(&self, _: Caller, name: &str) -> Result<GuestInfo, ApiError> {
        match name {
            "linked" => Err(ApiError::new(ErrorCode::CannotDetach, "linked attached by itself")),
            name => Ok(guest(name, false)),
        }
    }
    fn migrations(&self) -> Vec<Migration> {
        vec![self.migration.borrow().clone()]
    }
    fn migration(&self, id: &str) -> Result<Migration, ApiError> {
        self.known(id).map(|()| self.migration.borrow().clone())
    }
    async fn check(&self, order: Order) -> Result<CheckReport, ApiError> {
        Ok(CheckReport { ok: true, guest: order.guest, host: order.host, ..CheckReport::default() })
    }
    async fn migrate(&self, caller: Caller, order: Order) -> Result<Migration, ApiError> {
        // Client and server are one process here.
        assert!(caller.pid == Some(std::process::id()) && caller.uid.is_some() && caller.program.is_some());
        match order.guest.as_str() {
            "web1" => {
                self.orders.borrow_mut().push(order);
                Ok(self.migration.borrow().clone())
            }
            "bug" => panic!("on purpose"),
            other => Err(ApiError::new(ErrorCode::UnknownGuest, format!("no guest {other}"))),
        }
    }
    fn cancel(&self, _: Caller, id: &str) -> Result<Migration, ApiError> {
        self.known(id)?;
        self.migration.send_modify(|migration| migration.outcome = Some(Outcome::Cancelled));
        self.migration(id)
    }
    fn resolve(&self, _: Caller, id: &str, resolve: Resolve) -> Result<Migration, ApiError> {
        self.known(id)?;
        assert!(resolve.other_host_is_off);
        Ok(self.migration.borrow().clone())
    }

    fn abandon(&self, _: Caller, id: &str) -> Result<Migration, ApiError> {
        self.known(id)?;
        Err(ApiError::new(ErrorCode::TooLate, "nothing is missing"))
    }
    fn watch(&self, id: &str) -> Result<watch::Receiver<Migration>, ApiError> {
        self.known(id).map(|()| self.migration.subscribe())
    }
    async fn metrics(&self) -> String {
        "memlane_guests 1\n".to_owned()
    }
}

fn guest(name: &str, incoming: bool) -> GuestInfo {
    GuestInfo {
        name: name.to_owned(),
        vmm: "qemu".to_owned(),
        machine: Some("pc-q35-7.2".to_owned()),
        vcpus: 1,
        ram_bytes: 1 << 30,
        tracker: "pagemap".to_owned(),
        standing: if incoming { Standing::Incoming } else { Standing::Running },
        nics: Vec::new(),
        pid: Some(1),
        qmp: Some("/run/memlane/guests/web1/qmp.sock".to_owned()),
    }
}

/// Runs a test on a thread that serves the API as well, to the user of the test.
fn with_server<F: Future<Output = ()>>(test: impl FnOnce(Rc<Fake>, Client) -> F) {
    let access = Access::of_this_process();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        let migration = watch::Sender::new(Migration::new("00ff", "web1", "host-b"));
        let fake = Rc::new(Fake { migration, orders: RefCell::default() });
        let listener = server::bind(&socket, access.socket_mode()).unwrap();
        memlane_net::task::spawn("API server", server::serve(listener, access, fake.clone()));
        test(fake, Client::new(socket)).await;
    });
}

async fn raw(
    client: &Client,
    method: Method,
    path: &str,
    body: impl Into<Bytes>,
) -> (StatusCode, String, String) {
    let stream = UnixStream::connect(client.socket()).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = Request::builder().method(method).uri(path).body(Full::new(body.into())).unwrap();
    let answer = sender.send_request(request).await.unwrap();
    let status = answer.status();
    let allow = answer.headers().get("allow").map_or("", |value| value.to_str().unwrap()).to_owned();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, allow, String::from_utf8(body.to_vec()).unwrap())
}

#[test]
fn every_call_of_the_client_is_answered() {
    with_server(|fake, client| async move {
        assert_eq!(client.status().await.unwrap().host, "host-a");
        assert_eq!(client.ports().await.unwrap().len(), 1);
        assert_eq!(client.peers().await.unwrap()[0].name, "host-b");
        assert!(client.guests().await.unwrap().is_empty());
        assert_eq!(client.migrations().await.unwrap().len(), 1);
        assert_eq!(client.migration("00ff").await.unwrap().guest, "web1");
        assert_eq!(client.metrics().await.unwrap(), "memlane_guests 1\n");
        // Control characters take six bytes each in JSON.
        let longest = Launch { definition: "\u{1}".repeat(64 << 10), incoming: true };
        assert_eq!(client.launch(&longest).await.unwrap().standing, Standing::Incoming);
        let attach = Attach { name: "web1".to_owned(), qmp: "/run/qmp".to_owned(), incoming: false };
        assert_eq!(client.attach(&attach).await.unwrap(), guest("web1", false));
        assert_eq!(client.detach("a.b-c_1").await.unwrap(), guest("a.b-c_1", false));
        let order = Order {
            guest: "web1".to_owned(),
            host: "host-b".to_owned(),
            downtime_limit_seconds: Some(0.3),
            verify: true,
            ..Order::default()
        };
        assert!(client.check(&order).await.unwrap().ok);
        assert_eq!(client.migrate(&order).await.unwrap().id, "00ff");
        assert_eq!(*fake.orders.borrow(), [order]);
    });
}

#[test]
fn errors_are_told_with_their_code_and_status() {
    with_server(|_, client| async move {
        let code = |error: ClientError| match error {
            ClientError::Api(error) => error.code,
            other => panic!("{other}"),
        };
        let order = Order { guest: "db1".to_owned(), host: "host-b".to_owned(), ..Order::default() };
        assert_eq!(code(client.migrate(&order).await.unwrap_err()), ErrorCode::UnknownGuest);
        let order = Order { guest: "bug".to_owned(), ..order };
        assert_eq!(code(client.migrate(&order).await.unwrap_err()), ErrorCode::Internal);
        let order = Order { downtime_limit_seconds: Some(f64::MAX), ..order };
        assert_eq!(code(client.check(&order).await.unwrap_err()), ErrorCode::Invalid);
        assert_eq!(code(client.migration("0123").await.unwrap_err()), ErrorCode::UnknownMigration);
        assert_eq!(code(client.cancel("../status").await.unwrap_err()), ErrorCode::UnknownMigration);
        assert_eq!(code(client.events("0123").await.unwrap_err()), ErrorCode::UnknownMigration);

        assert_eq!(code(client.launch(&Launch::default()).await.unwrap_err()), ErrorCode::CannotLaunch);
        let attach = Attach { name: "web1".to_owned(), qmp: "/none".to_owned(), incoming: false };
        assert_eq!(code(client.attach(&attach).await.unwrap_err()), ErrorCode::CannotAttach);
        for bad in ["qmp.sock", "", "/a\0b", &"/".repeat(108)] {
            let attach = Attach { qmp: bad.to_owned(), ..attach.clone() };
            assert_eq!(code(client.attach(&attach).await.unwrap_err()), ErrorCode::Invalid, "{bad}");
        }
        let attach = Attach { name: "../web1".to_owned(), ..attach };
        assert_eq!(code(client.attach(&attach).await.unwrap_err()), ErrorCode::Invalid);
        assert_eq!(code(client.detach("linked").await.unwrap_err()), ErrorCode::CannotDetach);
        assert_eq!(code(client.detach("../status").await.unwrap_err()), ErrorCode::UnknownGuest);

        let cases = [
            (Method::GET, "/", "", 404, "unknown_route"),
            (Method::GET, "/v1/migrations/", "", 404, "unknown_route"),
            (Method::GET, "/v1/migrations/00ff/events/1", "", 404, "unknown_route"),
            (Method::PUT, "/v1/migrations", "", 405, "unknown_method"),
            (Method::GET, "/v1/migrations/0123", "", 404, "unknown_migration"),
            (Method::POST, "/v1/guests//detach", "", 404, "unknown_route"),
            (Method::POST, "/v1/guests/launch", "{}", 400, "invalid"),
            (Method::POST, "/v1/guests/launch", &" ".repeat(500_000), 413, "too_large"),
            (Method::POST, "/v1/guests/attach", "{\"name\":\"a\",\"qmp\":\"/q\",\"x\":1}", 400, "invalid"),
            (Method::POST, "/v1/check", "", 400, "invalid"),
            (Method::POST, "/v1/check", "{\"guest\":\"web1\"}", 400, "invalid"),
            (Method::POST, "/v1/check", "{\"guest\":\"web1\",\"host\":\"b\",\"hots\":1}", 400, "invalid"),
            (Method::POST, "/v1/check", &" ".repeat(70_000), 413, "too_large"),
        ];
        for (method, path, body, status, code) in cases {
            let (found, allow, text) = raw(&client, method.clone(), path, body.to_owned()).await;
            assert_eq!(found.as_u16(), status, "{method} {path}: {text}");
            let body: ErrorBody = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_value(body.error.code).unwrap(), code, "{text}");
            assert_eq!(allow, if status == 405 { "GET, POST" } else { "" });
        }
    });
}

/// Looking is what GET does, and nothing else is.
#[test]
fn every_route_has_a_role() {
    for (method, path, call) in &routes::ROUTES {
        let expected = if *method == Method::GET { Role::Viewer } else { Role::Operator };
        assert_eq!(call.needs(), expected, "{method} {path}");
    }
}

#[test]
fn the_description_is_served() {
    with_server(|_, client| async move {
        let (status, _, text) = raw(&client, Method::GET, "/v1/openapi.json?pretty", "").await;
        assert_eq!((status, text.as_str()), (StatusCode::OK, super::routes::DESCRIPTION));
    });
}

#[test]
fn events_tell_what_changes_and_end_with_the_outcome() {
    with_server(|fake, client| async move {
        let mut events = client.events("00ff").await.unwrap();
        assert_eq!(events.next().await.unwrap().unwrap().phase, Phase::Preflight);
        fake.migration.send_modify(|migration| migration.phase = Phase::Copying);
        assert_eq!(events.next().await.unwrap().unwrap().phase, Phase::Copying);
        // Told as one: the stream is slower than these.
        for remaining in [3, 2, 1] {
            fake.migration.send_modify(|migration| migration.pages_remaining = remaining);
        }
        assert_eq!(events.next().await.unwrap().unwrap().pages_remaining, 1);
        client.cancel("00ff").await.unwrap();
        assert_eq!(events.next().await.unwrap().unwrap().outcome, Some(Outcome::Cancelled));
        assert_eq!(events.next().await.unwrap(), None);
        // One that has ended is told at once.
        let mut events = client.events("00ff").await.unwrap();
        assert!(events.next().await.unwrap().unwrap().outcome.is_some());
    });
}

#[test]
fn prometheus_reads_metrics_over_tcp_and_nothing_else() {
    with_server(|fake, _| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        memlane_net::task::spawn("metrics server", server::serve_metrics(listener, fake));
        for (path, status) in [("/metrics", 200), ("/v1/status", 404), ("/v1/migrations/00ff", 404)] {
            let stream = TcpStream::connect(address).await.unwrap();
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            let request = Request::builder().uri(path).body(Full::new(Bytes::new())).unwrap();
            let answer = sender.send_request(request).await.unwrap();
            assert_eq!(answer.status().as_u16(), status, "{path}");
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body == "memlane_guests 1\n", status == 200, "{path}: {body:?}");
        }
    });
}

#[test]
fn what_is_begun_goes_on_when_the_caller_hangs_up() {
    with_server(|fake, client| async move {
        let order = Order { guest: "web1".to_owned(), host: "host-b".to_owned(), ..Order::default() };
        let body = serde_json::to_string(&order).unwrap();
        let stream = UnixStream::connect(client.socket()).await.unwrap();
        let length = body.len();
        let request =
            format!("POST /v1/migrations HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n{body}");
        assert_eq!(stream.try_write(request.as_bytes()).unwrap(), request.len());
        drop(stream);
        while fake.orders.borrow().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
}

/// Readers that never read: of events, of answers, and such as never ask.
#[test]
fn a_crowd_does_not_keep_the_operator_out() {
    with_server(|_, client| async move {
        let mut crowd = Vec::new();
        for number in 0..2 * super::line::MAX_CONNECTIONS {
            let stream = UnixStream::connect(client.socket()).await.unwrap();
            let asks = match number % 3 {
                0 => "",
                1 => "GET /v1/openapi.json HTTP/1.1\r\nhost: x\r\n\r\n",
                _ => "GET /v1/migrations/00ff/events HTTP/1.1\r\nhost: x\r\n\r\n",
            };
            assert_eq!(stream.try_write(asks.as_bytes()).unwrap_or(0), asks.len());
            crowd.push(stream);
            // What was asked for is begun before the next one comes.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for stream in crowd.iter().rev().take(super::line::MAX_CONNECTIONS) {
            let _ = stream.try_write(b"GET /v1/migrations/00ff/events HTTP/1.1\r\nhost: x\r\n\r\n");
        }
        let operator = async {
            assert_eq!(client.status().await.unwrap().host, "host-a");
            let refused =
                client.events("00ff").await.err().map(|error| error.to_string()).unwrap_or_default();
            assert!(refused.contains("streams of events are open"), "{refused}");
            assert_eq!(client.cancel("00ff").await.unwrap().outcome, Some(Outcome::Cancelled));
        };
        tokio::time::timeout(Duration::from_secs(5), operator).await.expect("the operator is served");
        // When they are gone, others may follow.
        drop(crowd);
        let followed = async {
            while client.events("00ff").await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), followed).await.expect("there is room again");
    });
}

#[test]
fn a_client_says_why_it_cannot_connect() {
    let directory = tempfile::tempdir().unwrap();
    let message = |name: &str| {
        let client = Client::new(directory.path().join(name));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(client.status()).unwrap_err().to_string()
    };
    let missing = message("missing");
    assert!(missing.contains("missing") && missing.contains("systemctl status memlaned"), "{missing}");
    std::fs::write(directory.path().join("file"), "").unwrap();
    assert!(message("file").contains("is no socket"), "{}", message("file"));
    // A socket that nobody listens on any more.
    drop(std::os::unix::net::UnixListener::bind(directory.path().join("stale")).unwrap());
    assert!(message("stale").contains("Is it running?"), "{}", message("stale"));
}

#[test]
fn a_stale_socket_is_replaced_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _context = runtime.enter();
    let stale = directory.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let listener = server::bind(&stale, 0o660).unwrap();
    let error = server::bind(&stale, 0o660).unwrap_err().to_string();
    assert!(error.contains("another daemon listens"), "{error}");
    drop(listener);
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let error = server::bind(&file, 0o660).unwrap_err().to_string();
    assert!(error.contains("is no socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    let error = server::bind(&file.join("below"), 0o660).unwrap_err().to_string();
    assert!(error.contains("cannot open the socket"), "{error}");
}
