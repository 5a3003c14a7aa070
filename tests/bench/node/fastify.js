import fastify from "fastify";
import { BODY_LIMIT, allowed, keep } from "./inbox.js";

export async function listen(port, host) {
  const app = fastify({ bodyLimit: BODY_LIMIT });
  app.removeAllContentTypeParsers();
  app.addContentTypeParser("application/json", { parseAs: "string" }, (_request, body, done) => done(null, body));
  app.addHook("onRequest", async (request, reply) => {
    if (!allowed(request.headers["verification-token"])) {
      return reply.code(401).send();
    }
  });
  app.post("/redox", async (request, reply) => {
    await keep(request.body);
    return reply.code(200).send();
  });
  await app.listen({ port, host });
}
