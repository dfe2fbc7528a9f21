//! Proxy: the way of a request, top to bottom. Each step is a file.
//!
//! ```text
//!  1 accept      accept.rs        connection limit, the worker with the least to do; PROXY protocol in connection.rs
//!  2 tls         connection.rs    handshake under a deadline, SNI, ALPN
//!  3 connection  connection.rs, http2_server.rs    HTTP/1.1 (our codec) or HTTP/2 until it ends or drains
//!  4 route       route.rs         host, path, method, headers -> service, or a fixed answer
//!  5 identify    identify.rs      session key, kind of exchange; bounded look into the body where a key may be there
//!  6 turn        pick.rs          one run a session, where that is asked for; the dispatcher says whose turn it is
//!                repeat.rs        starts that were made before are given the first one's answer
//!  7 pick        pick.rs          the dispatcher: pinned? its endpoint; new? version by cohort, then the least outstanding; reserved at once
//!  8 forward     forward.rs       attempts, connections (upstream.rs, pool.rs), time-outs, retries of what was not sent
//!  9 stream      relay.rs         both directions as they come; peer.rs: the two sides; observe.rs: what is noticed
//! 10 account     account.rs       exactly once, when the record is dropped
//! ```
//!
//! What a step takes it returns as a guard: the [`crate::state::dispatcher::Lease`] is given back with the endpoint's last
//! byte, the record is told when it is dropped.

pub mod accept;
pub mod account;
pub mod buffer;
pub mod connection;
pub mod cut;
pub mod detached;
pub mod edits;
pub mod forward;
pub mod forwarded;
pub mod heartbeat;
pub mod http2_server;
pub mod identify;
pub mod in_place;
pub mod learn;
pub mod observe;
pub mod peer;
pub mod pick;
pub mod pool;
pub mod problem;
pub mod relay;
pub mod repeat;
pub mod respond;
pub mod rewrite;
pub mod route;
pub mod shadow;
pub mod timer;
pub mod upstream;
pub mod watch;
pub mod websocket;
pub mod worker;

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::error::{Code, ProxyError};
use crate::message::{RequestHead, Version};
use crate::proxy::account::Record;
use crate::proxy::connection::Connection;
use crate::proxy::forward::Forwarded;
use crate::proxy::forwarded::Outside;
use crate::proxy::peer::Peer;
use crate::proxy::relay::End;
use crate::proxy::timer::Timer;
use crate::snapshot::{AcceptCommand, Listener, Running};

/// The data plane's threads.
pub struct Handle {
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Handle {
    /// Waits until every thread has ended, which they do at [`crate::drain::Phase::Forced`].
    pub fn join(self) {
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the data plane has panicked");
            }
        }
    }
}

/// Starts the workers and the accept loop.
pub fn start(
    running: Arc<Running>,
    workers: usize,
    commands: mpsc::Receiver<AcceptCommand>,
) -> std::io::Result<Handle> {
    let mut handles = Vec::with_capacity(workers);
    let mut threads = Vec::with_capacity(workers + 1);
    for index in 0..workers.max(1) {
        let (handle, thread) = worker::start(index, running.clone())?;
        handles.push(handle);
        threads.push(thread);
    }
    let runtime = tokio::runtime::Builder::new_current_thread();
    threads.push(std::thread::Builder::new().name("accept".into()).spawn(move || {
        let mut runtime = runtime;
        match runtime.enable_all().build_local(Default::default()) {
            Ok(runtime) => runtime.block_on(accept::run(running, handles.into(), commands)),
            Err(error) => tracing::error!("the accept loop could not start: {error}"),
        }
    })?);
    Ok(Handle { threads })
}

/// As [`start`], everything on this thread and its runtime.
#[cfg(feature = "simulation")]
pub fn start_here(running: Arc<Running>, workers: usize, commands: mpsc::Receiver<AcceptCommand>) {
    let handles: Vec<_> = (0..workers.max(1)).map(|index| worker::start_here(index, running.clone())).collect();
    tokio::task::spawn_local(accept::run(running, handles.into(), commands));
}

/// What becomes of an HTTP/1.1 client's connection after an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    KeepAlive,
    /// Close, but let the client read the answer first.
    Linger,
    /// Close at once: there is nobody to read, or the answer must look cut.
    Close,
}

/// What an exchange must still know of its request once that was sent.
pub struct Caller {
    pub version: Version,
    /// It wants no body (HEAD).
    pub head_only: bool,
    pub keep_alive: bool,
    /// It asks though it was told that the proxy ends: no run starts for it.
    pub knew_better: bool,
}

/// One exchange: from its head to the last byte of its answer. The head is boxed and errors are, so that a silent stream
/// does not keep room for either.
pub async fn exchange(
    connection: &Connection,
    client: &mut Peer,
    request: Box<RequestHead>,
    timer: &mut Timer,
) -> After {
    let listener = connection.listener();
    let mut record = Record::open(connection, listener.clone(), &request);
    let caller = Caller {
        version: request.version,
        head_only: request.method == http::Method::HEAD,
        keep_alive: request.keep_alive,
        knew_better: connection.refuses_starts(),
    };
    // Boxed, so that a stream that lasts minutes does not keep the room that its beginning needed.
    let begun = in_place::pinned(|| begin(connection, &listener, client, request, &caller, timer, &mut record)).await;
    let mut flow = match begun {
        Ok(Begun::Streaming(flow)) => flow,
        Ok(Begun::Answered) => return after_own_answer(client, &caller, connection),
        Ok(Begun::ClientGone) => return After::Close,
        Ok(Begun::Replayed(replayed)) => return after_replay(client, replayed, &mut record),
        Err(error) => return Box::pin(answer_error(connection, client, &caller, error, timer, &mut record)).await,
    };
    let end = whose(relay::stream(client, &mut flow, timer).await, &connection.worker.running);
    let last_word = flow.last_word(end);
    if detached::goes_on(&flow, end) {
        detached::spawn(connection, flow, record);
        reset(client, h2::Reason::CANCEL);
        return After::Close;
    }
    flow.tell(&mut record);
    if end != End::Whole {
        // The endpoint is to see the end of this run before the start of the next that takes its slot.
        flow.upstream.hang_up();
    }
    let finish = flow.give_back(end);
    record.ended(finish);
    if let Some(error) = cut_short(end)
        && client.take_back_head()
    {
        // The client has seen nothing of this answer yet, so it can still be told what became of it.
        drop(flow);
        return Box::pin(answer_error(connection, client, &caller, error, timer, &mut record)).await;
    }
    let said = match last_word {
        Some(word) => say(client, &word).await,
        None => false,
    };
    if !matches!(end, End::Whole | End::ClientGone) {
        cut(client, &flow).await;
    }
    let kept = match end {
        End::Whole => {
            let request_done = flow.request.done() || flow.tunnel;
            let upstream_keep_alive = flow.upstream_keep_alive && flow.request.done() && !flow.tunnel;
            flow.upstream.recycle(&connection.worker.pool, upstream_keep_alive);
            match (flow.tunnel, request_done) {
                (true, _) => After::Linger,
                (false, true) if flow.client_keep_alive => After::KeepAlive,
                (false, _) => After::Linger,
            }
        }
        End::ClientGone => After::Close,
        End::Truncated | End::DrainOver => {
            record.code = Some(Code::UpstreamReset);
            // A close frame is worth nothing to whom a reset overtakes it.
            if said && flow.tunnel { After::Linger } else { After::Close }
        }
        End::ProxyOver => {
            record.code = Some(Code::Draining);
            if said && flow.tunnel { After::Linger } else { After::Close }
        }
        End::Stopped(outcome) => {
            record.code = Some(watch::code_of_stop(outcome));
            After::Close
        }
        End::TimedOut(code) | End::Refused(code) => {
            record.code = Some(code);
            After::Close
        }
    };
    match end {
        End::Whole => {}
        End::ClientGone => reset(client, h2::Reason::CANCEL),
        _ => reset(client, h2::Reason::INTERNAL_ERROR),
    }
    kept
}

fn reset(client: &mut Peer, reason: h2::Reason) {
    if let Peer::Http2(http2) = client {
        http2.reset(reason);
    }
}

/// What to say of an answer that ended before its end, to a client that is still there.
fn cut_short(end: End) -> Option<ProxyError> {
    match end {
        End::Whole | End::ClientGone => None,
        End::Truncated => Some(ProxyError::new(
            Code::UpstreamReset,
            "the endpoint broke its answer off, or sent a malformed body, right behind its head",
        )),
        End::DrainOver => Some(ProxyError::new(Code::UpstreamReset, "the endpoint's drain has reached drain.timeout")),
        End::ProxyOver => Some(ProxyError::new(Code::Draining, "the proxy's drain has reached shutdown.timeout")),
        End::Stopped(outcome) => Some(ProxyError::new(watch::code_of_stop(outcome), "the run was ended")),
        End::TimedOut(code) | End::Refused(code) => Some(ProxyError::new(code, code.title())),
    }
}

/// At the end of the proxy's own drain exchanges are cut by the same word as at the end of an endpoint's.
pub(crate) fn whose(end: End, running: &Running) -> End {
    if end == End::DrainOver && running.drain.phase() >= crate::drain::Phase::Draining {
        running.cut_exchanges.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
        return End::ProxyOver;
    }
    end
}

/// As [`whose`], of an exchange that had no answer yet.
pub(crate) fn whose_error(error: ProxyError, running: &Running) -> ProxyError {
    match whose(End::DrainOver, running) {
        End::ProxyOver => ProxyError::new(
            Code::Draining,
            "the proxy's drain has reached shutdown.timeout before the endpoint answered",
        ),
        _ => error,
    }
}

/// Writes a last word, as far as it goes without waiting; whether it went out whole.
async fn say(client: &mut Peer, word: &[u8]) -> bool {
    let mut left = word;
    std::future::poll_fn(|context| {
        while !left.is_empty() {
            match client.poll_write(context, left) {
                std::task::Poll::Ready(Ok(count)) => left = &left[count..],
                std::task::Poll::Ready(Err(_)) | std::task::Poll::Pending => break,
            }
        }
        std::task::Poll::Ready(())
    })
    .await;
    if !client.is_http1() {
        // The connection's own task is to send it before the reset, which would overtake it.
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
    }
    left.is_empty()
}

/// Sees to it that the client can tell the cut from an end.
async fn cut(client: &mut Peer, flow: &relay::Flow) {
    let Peer::Http1(http1) = client else { return };
    // What waits is tried once and not waited for.
    std::future::poll_fn(|context| {
        let _ = http1.poll_flush(context);
        std::task::Poll::Ready(())
    })
    .await;
    if flow.until_close {
        http1.reset_on_close();
    }
}

/// How the beginning of an exchange ended.
pub enum Begun {
    Streaming(Box<relay::Flow>),
    /// A fixed answer was sent whole.
    Answered,
    /// The answer to an earlier start was sent.
    Replayed(repeat::Replayed),
    ClientGone,
}

/// Steps 4 to 8, up to the first byte of the answer.
async fn begin(
    connection: &Connection,
    listener: &Listener,
    client: &mut Peer,
    mut request: Box<RequestHead>,
    caller: &Caller,
    timer: &mut Timer,
    record: &mut Record,
) -> Result<Begun, ProxyError> {
    let current = connection.worker.current();
    let config = &current.snapshot.loaded.config;

    let trusted_proxies = &listener.config.trusted_proxies;
    let client_address = forwarded::effective_client(connection.peer.address, trusted_proxies, &request.fields);
    record.client = client_address;

    // HTTP/1.1 heads were held to both where they were read.
    let limits = &listener.config.limits;
    if request.fields.len() > limits.max_headers {
        return Err(ProxyError::new(Code::HeaderTooLarge, "the request has more fields than limits.max_headers"));
    }
    if caller.version == Version::Http2 && http2_server::head_bytes(&request) > limits.max_header_bytes {
        return Err(ProxyError::new(Code::HeaderTooLarge, "the request head exceeds limits.max_header_bytes"));
    }

    // 4 route
    let peer = &connection.peer;
    let trusted = connection.peer_trusted(listener);
    let outside = if trusted { Outside::told(peer, &request.fields) } else { Outside::of(peer) };
    let index = route::find(&config.routes, &request.method, &request.authority, &request.path, &request.fields)
        .ok_or_else(|| {
            ProxyError::new(
                Code::NoRoute,
                format!("no route for {} {}{}", request.method, request.authority, request.path),
            )
        })?;
    record.route = Some(index);
    let route = &config.routes[index];
    let service = match &route.action {
        crate::config::RouteAction::Service(service) => current.services[*service].clone(),
        fixed => {
            if let Some((mut head, body)) = problem::fixed(fixed, &request, &outside) {
                edits::apply(&route.response_headers, &mut head.fields);
                head.fields.append("longhaul-affinity", b"none");
                record.status = head.status.as_u16();
                let body = respond::for_caller(caller.head_only, &mut head, body);
                record.own_bytes_out = body.len() as u64;
                let close = after_own_answer(client, caller, connection) != After::KeepAlive;
                respond::send(client, &mut head, body, caller.version, close, timer).await;
            }
            return Ok(Begun::Answered);
        }
    };
    record.service = Some(service.clone());

    // 5 to 8
    let asked_debug = request.fields.get("longhaul-debug") == Some(b"1");
    record.debug =
        asked_debug && client_address.is_some_and(|address| config.debug_from.iter().any(|net| net.contains(&address)));
    let policy = pick::policy(&service.config, &request)?;
    forwarded::apply(&mut request.fields, peer, trusted, peer.scheme(), &request.authority);
    forwarded::add_ids(&mut request.fields, &forwarded::RequestIds::from_random(crate::ids::quick_random_bytes()));
    let begun = forward::forward(
        forward::Asked { connection, listener, service: &service, route, outside: &outside, policy, caller },
        client,
        request,
        timer,
        record,
    )
    .await?;
    Ok(match begun {
        Forwarded::Streaming(flow) => Begun::Streaming(flow),
        Forwarded::ClientGone => Begun::ClientGone,
        Forwarded::Replayed(replayed) => Begun::Replayed(replayed),
    })
}

/// The client's connection may carry another request after this one.
pub fn may_keep_alive(connection: &Connection, client: &Peer, caller: &Caller) -> bool {
    client.is_http1() && caller.keep_alive && !connection.told_to_close()
}

fn after_replay(client: &mut Peer, replayed: repeat::Replayed, record: &mut Record) -> After {
    match replayed {
        repeat::Replayed::Whole { keep_alive: true } => After::KeepAlive,
        repeat::Replayed::Whole { keep_alive: false } => After::Linger,
        repeat::Replayed::Truncated => {
            record.code = Some(Code::UpstreamReset);
            reset(client, h2::Reason::INTERNAL_ERROR);
            After::Close
        }
        repeat::Replayed::ClientGone => {
            reset(client, h2::Reason::CANCEL);
            After::Close
        }
    }
}

fn after_own_answer(client: &Peer, caller: &Caller, connection: &Connection) -> After {
    // A body that nobody read is still on the connection.
    if client.source_ended() && client.held().is_empty() && may_keep_alive(connection, client, caller) {
        After::KeepAlive
    } else {
        After::Linger
    }
}

/// Tells of an error in the event stream that was begun in the queue, which then breaks off visibly.
async fn fail_stream(client: &mut Peer, error: ProxyError, timer: &mut Timer, record: &mut Record) -> After {
    record.code = Some(error.code);
    let (_, body) = problem::error(&error, record.caller_form.as_deref());
    let event = [b"event: error\ndata: ", body.trim_ascii(), b"\n\n"].concat();
    record.own_bytes_out = event.len() as u64;
    respond::write(client, event.into(), timer).await;
    reset(client, h2::Reason::INTERNAL_ERROR);
    After::Close
}

/// Tells the client of an error that came before any answer.
async fn answer_error(
    connection: &Connection,
    client: &mut Peer,
    caller: &Caller,
    error: ProxyError,
    timer: &mut Timer,
    record: &mut Record,
) -> After {
    tracing::debug!(code = error.code.as_str(), detail = %error.detail, "exchange failed");
    if record.begun {
        return fail_stream(client, error, timer, record).await;
    }
    record.status = error.status.as_u16();
    record.code = Some(error.code);
    let (mut head, body) = problem::error(&error, record.caller_form.as_deref());
    head.fields.append("longhaul-affinity", record.affinity.as_str().as_bytes());
    if let Some(run) = record.run {
        let mut text = [0; 36];
        run.write(&mut text);
        head.fields.append("longhaul-run-id", &text);
    }
    record.add_debug_fields(&mut head.fields);
    let body = respond::for_caller(caller.head_only, &mut head, body);
    record.own_bytes_out = body.len() as u64;
    let after = after_own_answer(client, caller, connection);
    if respond::send(client, &mut head, body, caller.version, after != After::KeepAlive, timer).await {
        after
    } else {
        After::Close
    }
}
