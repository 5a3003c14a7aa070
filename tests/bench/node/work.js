// A receiver with the guarantees of ours, as Fastify and pg are usually written: one transaction a request.
//
// Before its 200 it checks the token and the source, finds a duplicate by its log id, and commits in one transaction:
// the message, its compressed and sealed payload, a delivery, and a chained audit row. Each connection has an audit
// chain of its own, so no request waits for the commit of another.
import { createCipheriv, createHash, createHmac, randomBytes, randomUUID } from "node:crypto";
import { promisify } from "node:util";
import { deflate, deflateSync } from "node:zlib";
import fastify from "fastify";
import { BODY_LIMIT, allowed, pool } from "./inbox.js";

const payloadKey = Buffer.from(process.env.BENCH_PAYLOAD_KEY, "hex");
const macKey = Buffer.from(process.env.BENCH_MAC_KEY, "hex");
const UNIQUE_VIOLATION = "23505";
const chains = new WeakMap();

// A small body is compressed at once, a large one by a thread of Node's pool, so that others are served meanwhile.
const SMALL = 64 * 1024;
const deflateLarge = promisify(deflate);

async function seal(body, uuid) {
  const compressed = body.length <= SMALL ? deflateSync(body, { level: 1 }) : await deflateLarge(body, { level: 1 });
  const nonce = randomBytes(12);
  const cipher = createCipheriv("aes-256-gcm", payloadKey, nonce);
  cipher.setAAD(Buffer.from(uuid.replaceAll("-", ""), "hex"));
  return Buffer.concat([nonce, cipher.update(compressed), cipher.final(), cipher.getAuthTag()]);
}

// Inserts the next audit row of the connection's chain. Returns where the chain goes on once it is committed.
async function audit(client, outcome, messageUuid, at) {
  const chain = chains.get(client) ?? { writer: randomUUID(), n: 0, mac: Buffer.alloc(0) };
  const n = chain.n + 1;
  const values = JSON.stringify([chain.writer, n, at.getTime(), "message.receive", outcome, messageUuid]);
  const mac = createHmac("sha256", macKey).update(chain.mac).update(values).digest();
  await client.query({
    name: "audit",
    text: `INSERT INTO audit_events (writer, n, at, action, outcome, message_uuid, mac)
           VALUES ($1, $2, $3, 'message.receive', $4, $5, $6)`,
    values: [chain.writer, n, at, outcome, messageUuid, mac],
  });
  return { writer: chain.writer, n, mac };
}

async function record(client, meta, body) {
  const uuid = randomUUID();
  const at = new Date();
  const sealed = await seal(body, uuid);
  await client.query("BEGIN");
  const inserted = await client.query({
    name: "message",
    text: `INSERT INTO messages (uuid, log_id, source_id, kind, received_at, sha256, size)
           VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id`,
    values: [uuid, meta.Logs[0].ID, meta.Source.ID, `${meta.DataModel}.${meta.EventType}`, at,
      createHash("sha256").update(body).digest(), body.length],
  });
  const { id } = inserted.rows[0];
  await client.query({
    name: "payload",
    text: "INSERT INTO payloads (message_id, sealed) VALUES ($1, $2)",
    values: [id, sealed],
  });
  await client.query({
    name: "delivery",
    text: "INSERT INTO deliveries (message_id, handler, lane) VALUES ($1, 'idle', $2)",
    values: [id, `idle/${meta.Source.ID}`],
  });
  const chain = await audit(client, "accepted", uuid, at);
  await client.query("COMMIT");
  chains.set(client, chain);
}

async function recordDuplicate(client, logId) {
  await client.query("BEGIN");
  const first = await client.query({ name: "first", text: "SELECT uuid FROM messages WHERE log_id = $1",
    values: [logId] });
  const chain = await audit(client, "duplicate", first.rows[0].uuid, new Date());
  await client.query("COMMIT");
  chains.set(client, chain);
}

// The status of the answer.
async function receive(body) {
  const { Meta: meta } = JSON.parse(body);
  const client = await pool.connect();
  let failure;
  try {
    const source = await client.query({ name: "source", text: "SELECT enabled FROM sources WHERE source_id = $1",
      values: [meta.Source.ID] });
    if (!source.rows[0]?.enabled) {
      return 403;
    }
    try {
      await record(client, meta, body);
    } catch (error) {
      await client.query("ROLLBACK");
      if (error.code !== UNIQUE_VIOLATION) {
        throw error;
      }
      await recordDuplicate(client, meta.Logs[0].ID);
    }
    return 200;
  } catch (error) {
    failure = error;
    throw error;
  } finally {
    client.release(failure);
  }
}

export async function listen(port, host) {
  const app = fastify({ bodyLimit: BODY_LIMIT });
  app.removeAllContentTypeParsers();
  app.addContentTypeParser("application/json", { parseAs: "buffer" }, (_request, body, done) => done(null, body));
  app.addHook("onRequest", async (request, reply) => {
    if (!allowed(request.headers["verification-token"])) {
      return reply.code(401).send();
    }
  });
  app.post("/redox", async (request, reply) => reply.code(await receive(request.body)).send());
  await app.listen({ port, host });
}
