// Server-sent events of a response's body.

/**
 * The data of each event, as it arrives. Bytes may be cut anywhere, inside a character or a line end too.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @yields {string} the event's `data` lines, joined; comments and events without data are passed over
 */
export async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    // Whoever stops reading hangs up: the server frees the answer's pages then.
    reader.cancel().catch(() => {});
  }
}
