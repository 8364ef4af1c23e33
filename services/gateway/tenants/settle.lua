-- Note what has become of admitted requests, and charge the tokens that were not known before.
-- KEYS: (hash of a tenant, its open requests)..., hash of requests that go on without a client (charge_left.lua)
-- ARGV: for each tenant JSON of {begun, ended: ids; tokens: to charge or to give back; limit: tokens a minute, or none;
-- prompt, generated: tokens, for the usage; media: bytes to give back, or none; media_limit: bytes a minute, or none;
-- left: id -> tokens of the answer so far, of requests that go on without a client, or none; name: the tenant's}
-- requires: tenant_hash
local left = KEYS[#KEYS]
ensure_hash(left)
for i, text in ipairs(ARGV) do
  local key, open, said = KEYS[2 * i - 1], KEYS[2 * i], cjson.decode(text)
  ensure_hash(key)
  ensure_hash(open)
  for _, id in ipairs(said.begun) do begin(key, open, id) end
  for _, id in ipairs(said.ended) do forget(key, open, id) end
  for id, generated in pairs(said.left or {}) do
    redis.call('HSET', left, said.name .. ' ' .. id, string.format('%d:%d', generated, said.limit or 0))
  end
  if said.limit and said.tokens ~= 0 then raise_level(key, 'tokens', said.limit, said.tokens) end
  if said.media then
    if said.media_limit then raise_level(key, 'media', said.media_limit, -said.media) end
    redis.call('HINCRBY', key, 'used:media', -said.media)
  end
  if said.prompt > 0 then redis.call('HINCRBY', key, 'used:prompt', said.prompt) end
  if said.generated > 0 then redis.call('HINCRBY', key, 'used:generated', said.generated) end
end
