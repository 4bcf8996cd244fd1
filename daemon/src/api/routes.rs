//! The routes of the API: maps paths and methods to calls, and answers them.

use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use http_body_util::channel::{Channel, Sender};
use http_body_util::{Either, Full};
use hyper::body::{Body, Bytes};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, StatusCode};
use memlane_api::json::to_json;
use memlane_api::types::{
    ApiError, Attach, CheckReport, ErrorBody, ErrorCode, GuestInfo, Launch, Migration, Order, PeerInfo,
    PortInfo, Resolve, Status,
};
use memlane_net::task;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::call::Call;
use super::gate::Gate;
use super::line::Line;
use super::shares::Holder;
use super::streams::{Stream, Streams};
use super::{Backend, Caller, Role, body};

/// The description of the API, as it is committed and served. A test compares it with the routes.
pub const DESCRIPTION: &str = include_str!("openapi.json");
/// Events of one stream are at least this far apart. Changes between two events are combined.
pub const EVENT_INTERVAL: Duration = Duration::from_millis(100);
/// A stream without events gets a comment this often, because only a write notices that the reader has gone.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

pub(super) type Answer = hyper::Response<Either<Full<Bytes>, Channel<Bytes>>>;

/// The circumstances of a request.
pub(super) struct Asked {
    /// The process that asks.
    pub caller: Caller,
    /// What the process may do.
    pub role: Role,
    /// The connection of the request.
    pub line: Rc<Line>,
    /// The open streams of events.
    pub streams: Rc<Streams>,
    /// The gate that let the process in.
    pub gate: Rc<Gate>,
}

/// All routes: the method, the path, and the call. `{id}` or `{name}` stands for any one segment.
pub(super) const ROUTES: [(Method, &str, Call); 17] = [
    (Method::GET, "/v1/status", Call::Status),
    (Method::GET, "/v1/ports", Call::Ports),
    (Method::GET, "/v1/peers", Call::Peers),
    (Method::GET, "/v1/guests", Call::Guests),
    (Method::POST, "/v1/guests/launch", Call::Launch),
    (Method::POST, "/v1/guests/attach", Call::Attach),
    (Method::POST, "/v1/guests/{name}/detach", Call::Detach),
    (Method::POST, "/v1/check", Call::Check),
    (Method::GET, "/v1/migrations", Call::Migrations),
    (Method::POST, "/v1/migrations", Call::Migrate),
    (Method::GET, "/v1/migrations/{id}", Call::Migration),
    (Method::DELETE, "/v1/migrations/{id}", Call::Cancel),
    (Method::POST, "/v1/migrations/{id}/abandon", Call::Abandon),
    (Method::POST, "/v1/migrations/{id}/resolve", Call::Resolve),
    (Method::GET, "/v1/migrations/{id}/events", Call::Events),
    (Method::GET, "/v1/openapi.json", Call::OpenApi),
    (Method::GET, "/metrics", Call::Metrics),
];

/// Answers one request. Errors are answers too.
pub(super) async fn answer<B>(
    backend: Rc<dyn Backend>,
    asked: Asked,
    request: Request<B>,
) -> Result<Answer, Infallible>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let found = find(request.method(), request.uri().path()).map(|(call, id)| (call, id.to_owned()));
    Ok(match found {
        Ok((call, id)) => {
            dispatch(backend, asked, call, &id, request.into_body()).await.unwrap_or_else(error_answer)
        }
        Err(unrouted) => unrouted.answer(),
    })
}

/// Answers a request to the listener for Prometheus, where anyone may connect.
pub(super) async fn answer_metrics<B>(
    backend: Rc<dyn Backend>,
    line: Rc<Line>,
    request: Request<B>,
) -> Result<Answer, Infallible> {
    let _busy = line.busy();
    let asked = (request.method(), request.uri().path());
    Ok(match asked {
        (&Method::GET, "/metrics") => metrics(&*backend).await,
        _ => error_answer(ApiError::new(ErrorCode::UnknownRoute, "there is only GET /metrics here")),
    })
}

/// Finds the call of a request, and the segment that stands for `{id}` or `{name}`.
pub(super) fn find<'p>(method: &Method, path: &'p str) -> Result<(Call, &'p str), Unrouted> {
    let mut allowed = Vec::new();
    for (of_route, template, call) in &ROUTES {
        let Some(id) = matches(template, path) else { continue };
        if method == of_route {
            return Ok((*call, id));
        }
        allowed.push(of_route.as_str());
    }
    let path = path.chars().take(200).collect();
    Err(Unrouted { path, allowed: allowed.join(", ") })
}

/// A request for a path that does not exist, or not for this method.
#[derive(Debug)]
pub(super) struct Unrouted {
    path: String,
    allowed: String,
}

impl Unrouted {
    fn answer(self) -> Answer {
        let Self { path, allowed } = self;
        if allowed.is_empty() {
            let message = format!("there is nothing at {path}; GET /v1/openapi.json lists all paths");
            return error_answer(ApiError::new(ErrorCode::UnknownRoute, message));
        }
        let message = format!("{path} allows only {allowed}");
        let mut answer = error_answer(ApiError::new(ErrorCode::UnknownMethod, message));
        // RFC 9110, 15.5.6: a 405 names the methods that there are.
        let allowed = HeaderValue::from_str(&allowed).expect("names of methods are visible ASCII");
        answer.headers_mut().insert(ALLOW, allowed);
        answer
    }
}

fn matches<'p>(template: &str, path: &'p str) -> Option<&'p str> {
    let (mut wanted, mut found, mut id) = (template.split('/'), path.split('/'), "");
    loop {
        match (wanted.next(), found.next()) {
            (None, None) => return Some(id),
            (Some("{id}" | "{name}"), Some(segment)) if !segment.is_empty() => id = segment,
            (Some(wanted), Some(found)) if wanted == found => {}
            _ => return None,
        }
    }
}

async fn dispatch<B>(
    backend: Rc<dyn Backend>,
    asked: Asked,
    call: Call,
    id: &str,
    sent: B,
) -> Result<Answer, ApiError>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let host = &*backend;
    let Asked { caller, role, line, streams, gate } = asked;
    gate.check(&caller, role, call)?;
    let busy = line.busy();
    match call {
        Call::Status => Ok(status(host).await),
        Call::Ports => Ok(ports(host).await),
        Call::Peers => Ok(peers(host)),
        Call::Guests => Ok(guests(host)),
        Call::Launch => launch(backend, caller, body::read(sent).await?).await,
        Call::Attach => attach(backend, caller, body::read(sent).await?).await,
        Call::Detach => detach(backend, caller, id.to_owned()).await,
        Call::Check => check(backend, body::read(sent).await?).await,
        Call::Migrations => Ok(migrations(host)),
        Call::Migrate => migrate(backend, caller, body::read(sent).await?).await,
        Call::Migration => migration(host, id),
        Call::Cancel => cancel(backend, caller, id.to_owned()).await,
        Call::Abandon => abandon(backend, caller, id.to_owned()).await,
        Call::Resolve => resolve(backend, caller, id.to_owned(), body::read(sent).await?).await,
        Call::Events => events(host, id, streams.open(Holder { role, user: caller.uid }, busy)?),
        Call::OpenApi => Ok(openapi()),
        Call::Metrics => Ok(metrics(host).await),
    }
}

/// Returns the state of the daemon and its host.
#[utoipa::path(get, path = "/v1/status", tag = "host", responses((status = 200, body = Status)))]
async fn status(backend: &dyn Backend) -> Answer {
    json(StatusCode::OK, &backend.status().await)
}

/// Lists the network ports lent to migrations.
#[utoipa::path(get, path = "/v1/ports", tag = "host", responses((status = 200, body = [PortInfo])))]
async fn ports(backend: &dyn Backend) -> Answer {
    json(StatusCode::OK, &backend.ports().await)
}

/// Lists the hosts that guests may move to and come from.
#[utoipa::path(get, path = "/v1/peers", tag = "host", responses((status = 200, body = [PeerInfo])))]
fn peers(backend: &dyn Backend) -> Answer {
    json(StatusCode::OK, &backend.peers())
}

/// Lists the attached guests.
#[utoipa::path(get, path = "/v1/guests", tag = "host", responses((status = 200, body = [GuestInfo])))]
fn guests(backend: &dyn Backend) -> Answer {
    json(StatusCode::OK, &backend.guests())
}

/// Starts a QEMU guest from a guest file. When this answers, the guest runs, or its QEMU waits for it to arrive.
#[utoipa::path(
    post, path = "/v1/guests/launch", tag = "guests", request_body = Launch,
    responses(
        (status = 201, description = "Started", body = GuestInfo),
        (status = 403, description = "The caller may look, but not give orders", body = ErrorBody),
        (status = "4XX", description = "Nothing was left behind", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn launch(backend: Rc<dyn Backend>, caller: Caller, launch: Launch) -> Result<Answer, ApiError> {
    let guest = to_its_end(async move { backend.launch(caller.named().await, launch).await }).await?;
    Ok(json(StatusCode::CREATED, &guest))
}

/// Attaches a QEMU guest that another program started.
#[utoipa::path(
    post, path = "/v1/guests/attach", tag = "guests", request_body = Attach,
    responses(
        (status = 201, description = "Attached", body = GuestInfo),
        (status = 403, description = "The caller may look, but not give orders", body = ErrorBody),
        (status = "4XX", description = "The QEMU is as it was", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn attach(backend: Rc<dyn Backend>, caller: Caller, attach: Attach) -> Result<Answer, ApiError> {
    let guest = to_its_end(async move { backend.attach(caller.named().await, attach).await }).await?;
    Ok(json(StatusCode::CREATED, &guest))
}

/// Detaches a QEMU guest, launched or attached. It runs on without the daemon.
#[utoipa::path(
    post, path = "/v1/guests/{name}/detach", tag = "guests",
    params(("name" = String, Path, description = "Name of the guest")),
    responses(
        (status = 200, description = "Detached; this is the guest as it was", body = GuestInfo),
        (status = 403, description = "The caller may look, but not give orders", body = ErrorBody),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn detach(backend: Rc<dyn Backend>, caller: Caller, name: String) -> Result<Answer, ApiError> {
    let guest = to_its_end(async move { backend.detach(caller.named().await, &name).await }).await?;
    Ok(json(StatusCode::OK, &guest))
}

/// Makes a dry run of an order: all of its preflight, and nothing else.
#[utoipa::path(
    post, path = "/v1/check", tag = "migrations", request_body = Order,
    responses(
        (status = 200, description = "What was found; `ok` says whether the order would run", body = CheckReport),
        (status = 403, description = "The caller may look, but not give orders", body = ErrorBody),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn check(backend: Rc<dyn Backend>, order: Order) -> Result<Answer, ApiError> {
    let report = to_its_end(async move { backend.check(order).await }).await?;
    Ok(json(StatusCode::OK, &report))
}

/// Lists the migrations under way and those that ended lately, the oldest first.
#[utoipa::path(
    get, path = "/v1/migrations", tag = "migrations", responses((status = 200, body = [Migration]))
)]
fn migrations(backend: &dyn Backend) -> Answer {
    json(StatusCode::OK, &backend.migrations())
}

/// Moves a guest. When this answers, the preflight is done, and the migration runs on its own.
#[utoipa::path(
    post, path = "/v1/migrations", tag = "migrations", request_body = Order,
    responses(
        (status = 201, description = "Begun", body = Migration),
        (status = 403, description = "The caller may look, but not give orders", body = ErrorBody),
        (status = "4XX", description = "Refused; the guest runs on", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn migrate(backend: Rc<dyn Backend>, caller: Caller, order: Order) -> Result<Answer, ApiError> {
    let migration = to_its_end(async move { backend.migrate(caller.named().await, order).await }).await?;
    Ok(json(StatusCode::CREATED, &migration))
}

/// Returns one migration.
#[utoipa::path(
    get, path = "/v1/migrations/{id}", tag = "migrations",
    params(("id" = String, Path, description = "Identity of the migration")),
    responses((status = 200, body = Migration), (status = "4XX", body = ErrorBody))
)]
fn migration(backend: &dyn Backend, id: &str) -> Result<Answer, ApiError> {
    Ok(json(StatusCode::OK, &backend.migration(id)?))
}

/// Asks to cancel a migration that has not switched over yet. It has ended when it has an outcome.
#[utoipa::path(
    delete, path = "/v1/migrations/{id}", tag = "migrations",
    params(("id" = String, Path, description = "Identity of the migration")),
    responses(
        (status = 202, description = "Asked to end", body = Migration),
        (status = 403, description = "The caller may look, but not give orders", body = ErrorBody),
        (status = "4XX", body = ErrorBody),
    )
)]
async fn cancel(backend: Rc<dyn Backend>, caller: Caller, id: String) -> Result<Answer, ApiError> {
    let migration = to_its_end(async move { backend.cancel(caller.named().await, &id) }).await?;
    Ok(json(StatusCode::ACCEPTED, &migration))
}

/// Gives up the missing memory of a guest that runs at its destination in post-copy, for the case that the other host
/// is gone for good. At the destination the guest runs on, and every access to missing memory fails. At the source, where
/// the guest's memory is out of date, the migration ends.
#[utoipa::path(
    post, path = "/v1/migrations/{id}/abandon", tag = "migrations",
    params(("id" = String, Path, description = "Identity of the migration")),
    responses(
        (status = 202, description = "Given up", body = Migration),
        (status = 403, description = "The caller may look, but not give orders", body = ErrorBody),
        (status = "4XX", body = ErrorBody),
    )
)]
async fn abandon(backend: Rc<dyn Backend>, caller: Caller, id: String) -> Result<Answer, ApiError> {
    let migration = to_its_end(async move { backend.abandon(caller.named().await, &id) }).await?;
    Ok(json(StatusCode::ACCEPTED, &migration))
}

/// Decides about a guest in doubt: only the other host knows which host owns the guest, and it does not answer, or knows
/// nothing of the guest. The decision is safe only if the promise in it is true.
#[utoipa::path(
    post, path = "/v1/migrations/{id}/resolve", tag = "migrations", request_body = Resolve,
    params(("id" = String, Path, description = "Identity of the migration")),
    responses(
        (status = 202, description = "Decided; the daemon carries it out as soon as its journal has it", body = Migration),
        (status = 403, description = "The caller may look, but not give orders", body = ErrorBody),
        (status = "4XX", description = "Nothing was decided", body = ErrorBody),
    )
)]
async fn resolve(
    backend: Rc<dyn Backend>,
    caller: Caller,
    id: String,
    resolve: Resolve,
) -> Result<Answer, ApiError> {
    let resolved = to_its_end(async move { backend.resolve(caller.named().await, &id, resolve) });
    Ok(json(StatusCode::ACCEPTED, &resolved.await?))
}

/// Follows a migration as server-sent events: `migration` after each change, at most ten times a second, and `ended` as
/// the last one. The data of each event is the whole migration. The number of streams is limited, for all users together
/// and for each user; a stream beyond that is refused with 503.
#[utoipa::path(
    get, path = "/v1/migrations/{id}/events", tag = "migrations",
    params(("id" = String, Path, description = "Identity of the migration")),
    responses(
        (status = 200, content_type = "text/event-stream", body = Migration),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", description = "As many streams are open as there may be", body = ErrorBody),
    )
)]
fn events(backend: &dyn Backend, id: &str, stream: Stream) -> Result<Answer, ApiError> {
    let changes = backend.watch(id)?;
    let (sender, body) = Channel::new(1);
    task::spawn("event stream", async move {
        feed(changes, sender).await;
        drop(stream);
    });
    let mut answer = answer_of(StatusCode::OK, "text/event-stream", Either::Right(body));
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(answer)
}

/// Returns this description.
#[utoipa::path(
    get, path = "/v1/openapi.json", tag = "host",
    responses((status = 200, content_type = "application/json", body = Object))
)]
fn openapi() -> Answer {
    text("application/json", DESCRIPTION)
}

/// Returns all metrics in the text format of Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "host",
    responses((status = 200, content_type = "text/plain; version=0.0.4", body = String))
)]
async fn metrics(backend: &dyn Backend) -> Answer {
    text("text/plain; version=0.0.4", backend.metrics().await)
}

/// Runs work to its end even if the caller hangs up, which drops the answer's future.
async fn to_its_end<T: 'static>(
    work: impl Future<Output = Result<T, ApiError>> + 'static,
) -> Result<T, ApiError> {
    let failed = |error| {
        ApiError::new(
            ErrorCode::Internal,
            format!("the daemon failed at this request: {error}; see journalctl -u memlaned"),
        )
    };
    task::spawn("API request", work).await.map_err(failed)?
}

/// Writes events until the migration has ended or the reader is gone.
async fn feed(mut changes: watch::Receiver<Migration>, mut sender: Sender<Bytes>) {
    loop {
        let migration = changes.borrow_and_update().clone();
        let ended = migration.outcome.is_some();
        let event = if ended { "ended" } else { "migration" };
        let data = to_json(&migration);
        if sender.send_data(format!("event: {event}\ndata: {data}\n\n").into()).await.is_err() || ended {
            return;
        }
        sleep(EVENT_INTERVAL).await;
        loop {
            match timeout(KEEP_ALIVE, changes.changed()).await {
                Ok(Ok(())) => break,
                Ok(Err(_)) => return,
                Err(_) if sender.send_data(Bytes::from_static(b":\n\n")).await.is_err() => return,
                Err(_) => {}
            }
        }
    }
}

fn json(status: StatusCode, body: &impl Serialize) -> Answer {
    answer_of(status, "application/json", Either::Left(Full::from(to_json(body))))
}

fn text(kind: &'static str, body: impl Into<Bytes>) -> Answer {
    answer_of(StatusCode::OK, kind, Either::Left(Full::from(body.into())))
}

fn error_answer(error: ApiError) -> Answer {
    let status = StatusCode::from_u16(error.code.http_status()).expect("all of them lie within 100 to 999");
    json(status, &ErrorBody { error })
}

fn answer_of(status: StatusCode, kind: &'static str, body: Either<Full<Bytes>, Channel<Bytes>>) -> Answer {
    let mut answer = Answer::new(body);
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}
