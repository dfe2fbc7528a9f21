//! WebSocket messages of both ends: data in, data out, control frames left to the library.

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error, Message};

/// The next text or binary message; `None` after a clean close.
pub async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut WebSocketStream<S>,
) -> Result<Option<Message>, Error> {
    loop {
        match socket.next().await {
            None | Some(Ok(Message::Close(_)) | Err(Error::ConnectionClosed)) => return Ok(None),
            Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => return Ok(Some(message)),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error),
        }
    }
}

/// Sends one message at once.
pub async fn send<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut WebSocketStream<S>,
    message: Message,
) -> Result<(), Error> {
    socket.send(message).await
}
