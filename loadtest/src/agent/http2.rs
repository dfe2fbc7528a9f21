//! The mock agent on HTTP/2, with prior knowledge or after ALPN: the same answers as on HTTP/1.1.

use bytes::Bytes;
use h2::SendStream;
use h2::server::SendResponse;
use http::{Request, Response};
use tokio::io::{AsyncRead, AsyncWrite};

use super::Backend;
use super::answer::{Answer, Full, StreamPlan, answer};
use super::board::OpenRun;
use super::http1::Pace;
use crate::event::EventTemplate;

/// Serves one connection until it ends.
pub async fn serve<S>(stream: S, backend: Backend) -> anyhow::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connection = h2::server::Builder::new()
        .initial_window_size(1 << 20)
        .initial_connection_window_size(1 << 24)
        .max_concurrent_streams(10_000)
        .handshake(stream)
        .await?;
    while let Some(exchange) = connection.accept().await {
        let (request, respond) = exchange?;
        let backend = backend.clone();
        tokio::spawn(async move {
            // The generator reports broken streams from its side.
            let _ = exchange_one(request, respond, backend).await;
        });
    }
    Ok(())
}

async fn exchange_one(
    mut request: Request<h2::RecvStream>,
    mut respond: SendResponse<Bytes>,
    backend: Backend,
) -> anyhow::Result<()> {
    while let Some(data) = request.body_mut().data().await {
        let length = data?.len();
        request.body_mut().flow_control().release_capacity(length)?;
    }
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
    match answer(target, &backend) {
        Answer::Full(full) => write_full(&mut respond, &full, backend.number)?,
        Answer::Run(hold) => {
            let mut run = OpenRun::start(&backend);
            let worked = async {
                run.take_place().await;
                tokio::time::sleep(hold).await;
            };
            tokio::select! {
                () = worked => {}
                _ = std::future::poll_fn(|context| respond.poll_reset(context)) => return Ok(()),
            }
            drop(run);
            write_full(&mut respond, &Full { status: 200, body: "done".to_owned(), location: None }, backend.number)?;
        }
        Answer::Stream(plan) => {
            let _run = OpenRun::start(&backend);
            let head = Response::builder()
                .header("content-type", "text/event-stream")
                .header("x-agent", backend.number)
                .body(())?;
            let mut stream = respond.send_response(head, false)?;
            write_stream(&mut stream, &plan).await?;
            if plan.silent {
                std::future::poll_fn(|context| stream.poll_reset(context)).await?;
            }
        }
        // WebSockets over HTTP/2 (RFC 8441) are not played.
        Answer::WebSocket => write_full(&mut respond, &Full { status: 400, ..Full::default() }, backend.number)?,
    }
    Ok(())
}

fn write_full(respond: &mut SendResponse<Bytes>, full: &Full, backend: usize) -> anyhow::Result<()> {
    let mut head = Response::builder().status(full.status).header("x-agent", backend);
    if let Some(location) = &full.location {
        head = head.header("location", location);
    }
    let mut stream = respond.send_response(head.body(())?, full.body.is_empty())?;
    if !full.body.is_empty() {
        stream.send_data(Bytes::copy_from_slice(full.body.as_bytes()), true)?;
    }
    Ok(())
}

async fn write_stream(stream: &mut SendStream<Bytes>, plan: &StreamPlan) -> anyhow::Result<()> {
    let mut template = EventTemplate::new(plan.tag, plan.size);
    let mut pace = Pace::start(plan.interval)?;
    for sequence in 0..plan.events {
        pace.wait(sequence).await?;
        let event = Bytes::copy_from_slice(template.stamped(sequence, pace.stamp_ns(sequence)));
        pace.writing();
        stream.reserve_capacity(plan.size);
        while stream.capacity() < plan.size {
            // A size above the peer's window would wait for ever; events are far below it.
            match std::future::poll_fn(|context| stream.poll_capacity(context)).await {
                Some(capacity) => drop(capacity?),
                None => return Ok(()),
            }
        }
        stream.send_data(event, sequence + 1 == plan.events && !plan.silent)?;
        pace.written();
    }
    Ok(())
}
