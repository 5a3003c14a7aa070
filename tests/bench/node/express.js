import express from "express";
import { BODY_LIMIT, allowed, keep } from "./inbox.js";

export async function listen(port, host) {
  const app = express();
  app.disable("x-powered-by");
  app.disable("etag");
  const credential = (request, response, next) =>
    allowed(request.get("verification-token")) ? next() : response.status(401).end();
  app.post("/redox", credential, express.text({ type: "application/json", limit: BODY_LIMIT }),
    async (request, response) => {
      await keep(request.body);
      response.status(200).end();
    });
  await new Promise((resolve, reject) => {
    app.listen(port, host, (error) => (error ? reject(error) : resolve()));
  });
}
